// The launch table: threads, blocks, clusters and shared memory of every kernel as a function of shape and device, with
// the reasons. Host only, no CUDA header: the tests read it too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace camkd::cuda {

// What the table asks of a device.
struct Limits {
    int multiprocessors;
    int shared_per_block, shared_per_multiprocessor;  // bytes; a block takes 1 KB more than it asks for
    int l2;                                           // bytes
    int cluster;                                      // most blocks of a cluster; 1 before sm_90
    int block_threads;                                // kBlockThreads; less in tests that run on the host
};

// 256 threads of up to 80 registers: three blocks to a multiprocessor, so that one loads while others compute. More
// teachers, whose sums a thread keeps in registers, and kernels for any number of them (0) leave room for two.
constexpr int kBlockThreads = 256;
constexpr int kMaxFixedK = 5;
constexpr int blocks_per_multiprocessor(int fixed_k) {
    return fixed_k >= 1 && fixed_k <= 3 ? 3 : 2;
}
constexpr int kWarpThreads = 32;

// Most blocks of a cluster on a device of this major compute capability. 8 are portable; Hopper (9.x) and data-centre
// Blackwell (10.x) also take 16, consumer Blackwell (12.x) does not.
constexpr int kPortableCluster = 8;
constexpr int largest_cluster(int major) {
    return major < 9 ? 1 : major < 12 ? 16 : kPortableCluster;
}

// A warp takes whole rows up to this many vectors per lane, 2048 columns of 16 bits or 1024 of fp32 for the usual K =
// 3: no block barrier is needed, and the rows of 13 warps at least fit on a multiprocessor.
constexpr int kWarpVectors = 8;
constexpr int kWarpBufferBytes = 32 * 1024;  // bytes per warp: with more teachers rows go to blocks sooner
// Rows that a warp takes together, so that one's loads and another's arithmetic overlap; wide rows need no such help.
constexpr int kRowsPerWarp = 2;
constexpr int kRowsPerWarpBytes = 8 * 1024;  // bytes of stash per warp that such rows may take
// Up to this many elements of all K + 1 tensors per block (two or three rows of 100 classes per warp) one cluster does
// the whole batch, and adds up its rows: the idle multiprocessors cost less than a second launch, about 3 us.
constexpr int64_t kOneClusterElements = 8 * 1024;

// How row_loss runs. A team is a warp, a block or a cluster of blocks; it takes `rows` rows at a time.
struct RowGeometry {
    int threads;        // of a block
    int64_t blocks;     // of the grid; fewer than teams of rows: they loop
    int cluster;        // blocks of a cluster
    bool warp_per_row;  // a team is a warp
    int rows;           // rows that a team has in flight together; 1 unless warp_per_row
    int slots;          // vectors of a row that each thread of a team stashes
    int chunks;         // times that the stash is filled for a row: 1 means one read of global memory
    int shared;         // bytes
};

struct RowProblem {
    int64_t N;
    int C, K;
    int vectors;  // 16 bytes each, that a row touches at most,
    int vector;   // of so many elements
    int fixed_k;  // teachers of the kernel that runs, 0 for any number
    bool needs_mean;
    // Shared memory beside the stash: of each row in flight, each warp, each block; and of each block in a cluster,
    // once and for each rank.
    int row_bytes, warp_bytes, block_bytes, cluster_bytes, rank_bytes;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Bytes of shared memory of `threads` threads that stash `slots` vectors each of `rows` rows; `cluster` is 1 for warp
// teams.
inline int64_t row_shared(const RowProblem& p, int threads, int slots, int rows, bool warp_per_row, int cluster) {
    const int warps = threads / kWarpThreads;
    const int64_t buffer = int64_t(p.K + 1) * rows * slots * threads * 16;
    const int64_t exchange = cluster > 1 ? p.cluster_bytes + int64_t(cluster) * p.rank_bytes : 0;
    return buffer + int64_t(warp_per_row ? warps * rows : 1) * p.row_bytes + int64_t(warps) * p.warp_bytes +
           p.block_bytes + exchange;
}

inline int64_t shared_of_resident(const Limits& limits, int blocks) {
    return std::min<int64_t>(limits.shared_per_multiprocessor / blocks - 1024, limits.shared_per_block);
}

// Warps that a multiprocessor runs at once, in blocks of `threads` that take `shared` bytes each.
inline int resident_warps(const RowProblem& p, const Limits& limits, int threads, int64_t shared) {
    const int64_t by_registers = int64_t(limits.block_threads) * blocks_per_multiprocessor(p.fixed_k) / threads;
    const int64_t by_memory = limits.shared_per_multiprocessor / (shared + 1024);
    return int(std::min(by_registers, by_memory)) * (threads / kWarpThreads);
}

// What a row costs beside others, in the time that a warp takes for a vector per lane of every stream. A warp's share
// of reductions and addresses takes as long as one such vector of 16-bit logits. Idle slots count: lanes wait for
// lanes. Below 16 warps to a multiprocessor the latency of what a block does alone comes to light. Fitted to trial runs
// on an H200.
inline double row_cost(const RowProblem& p, int warps, int64_t slots, int chunks, int resident) {
    const double work = double(warps) * (double(slots) + chunks * 8.0 / p.vector);
    const double latency = 1 + 0.41 * std::pow(std::max(24 - resident, 0) / 16.0, 3.5);
    return work * latency * (chunks > 1 ? 1.15 : 1.0);
}

// Rows of a warp each: in blocks as large as leaves room for most warps.
inline bool warp_geometry(const RowProblem& p, const Limits& limits, RowGeometry& g) {
    const int per_lane = int(ceil_div(p.vectors, kWarpThreads));
    const int64_t warp_buffer = int64_t(p.K + 1) * per_lane * kWarpThreads * 16;
    if (per_lane > kWarpVectors || warp_buffer > kWarpBufferBytes) return false;
    g.warp_per_row = true;
    g.slots = per_lane;
    g.cluster = g.chunks = 1;
    const int64_t rows = std::min<int64_t>(kRowsPerWarp, kRowsPerWarpBytes / warp_buffer);
    // Not at the price of idle multiprocessors.
    const int64_t warps =
        int64_t(limits.multiprocessors) * blocks_per_multiprocessor(p.fixed_k) * limits.block_threads / kWarpThreads;
    g.rows = int(std::max<int64_t>(1, std::min(rows, p.N / warps)));
    int most = 0;
    for (int threads = limits.block_threads; threads >= kWarpThreads; threads /= 2) {
        const int64_t shared = row_shared(p, threads, g.slots, g.rows, true, 1);
        if (shared > limits.shared_per_block) continue;
        const int resident = resident_warps(p, limits, threads, shared);
        if (8 * resident <= 9 * most) continue;  // smaller blocks must earn their number
        most = resident;
        g.threads = threads;
        g.shared = int(shared);
    }
    if (most == 0) return false;
    g.blocks = ceil_div(p.N, int64_t(g.rows) * (g.threads / kWarpThreads));
    const int blocks = std::min(limits.cluster, kPortableCluster);
    if (p.needs_mean && p.N * p.C * (p.K + 1) <= kOneClusterElements * blocks) {
        g.cluster = int(std::min<int64_t>(g.blocks, blocks));
        while (g.cluster & (g.cluster - 1)) ++g.cluster;  // clusters come in powers of two
        g.blocks = g.cluster;
    }
    return true;
}

// The grid is left at one team per set of rows; `limit_grid` fits it to what is resident.
inline RowGeometry row_geometry(const RowProblem& p, const Limits& limits) {
    RowGeometry best{};
    if (warp_geometry(p, limits, best)) return best;
    double least = INFINITY;
    const auto consider = [&](RowGeometry g, int64_t shared, int64_t slots) {
        if (shared > limits.shared_per_block) return;
        const double cost = row_cost(p, g.threads / kWarpThreads * g.cluster, slots, g.chunks,
                                     resident_warps(p, limits, g.threads, shared));
        if (cost >= 0.95 * least) return;  // what comes first is simpler: large blocks, small clusters, one read
        least = cost;
        best = g;
        best.shared = int(shared);
    };
    RowGeometry g{};
    g.rows = g.chunks = 1;
    // One read: a block or a cluster has room for the row. Smaller blocks share the reductions among fewer warps.
    const int least_threads = std::min(limits.block_threads, kBlockThreads / 2);
    for (g.threads = limits.block_threads; g.threads >= least_threads; g.threads /= 2) {
        for (g.cluster = 1; g.cluster <= limits.cluster; g.cluster *= 2) {
            g.slots = int(std::min<int64_t>(ceil_div(p.vectors, int64_t(g.threads) * g.cluster), 1 << 16));
            g.blocks = p.N * g.cluster;
            consider(g, row_shared(p, g.threads, g.slots, 1, false, g.cluster), g.slots);
        }
    }
    // Two reads: the stash holds what a block works on, and its last part is not read again.
    g.threads = limits.block_threads;
    g.cluster = 1;
    const int64_t slots = ceil_div(p.vectors, g.threads);
    const int64_t fixed = row_shared(p, g.threads, 0, 1, false, 1);
    const int64_t per_slot = row_shared(p, g.threads, 1, 1, false, 1) - fixed;
    for (int blocks = blocks_per_multiprocessor(p.fixed_k); blocks > 0; --blocks) {
        const int64_t room = std::max<int64_t>(1, (shared_of_resident(limits, blocks) - fixed) / per_slot);
        g.chunks = int(ceil_div(slots, room));
        if (g.chunks == 1) continue;
        g.slots = int(ceil_div(slots, g.chunks));
        // As few rows under way as keep the second read in L2, where that is possible with all multiprocessors at work.
        const int64_t row = int64_t(p.vectors) * 16 * (p.K + 1), in_cache = limits.l2 / row;
        g.blocks = in_cache < limits.multiprocessors ? p.N : std::min(p.N, in_cache);
        consider(g, row_shared(p, g.threads, g.slots, 1, false, 1), slots);
    }
    return best;
}

// No more blocks than run at once (a multiple of the cluster): rows are dealt out evenly, so that a second wave would
// double the time.
inline void limit_grid(RowGeometry& g, int64_t resident) {
    g.blocks = std::max<int64_t>(g.cluster, std::min(g.blocks, resident / g.cluster * g.cluster));
}

// Count and sums of a batch, a block each: as many threads as there may be, as they only wait for memory.
constexpr int kBatchThreads = 1024;

inline int batch_threads(const Limits& limits) {
    return std::min(kBatchThreads, limits.block_threads * (kBatchThreads / kBlockThreads));
}

// How the other kernels run: rows that take a warp each, or a block each.
struct RowGrid {
    int threads;
    int64_t blocks;
    bool warp_per_row;
};

// Up to this many vectors per lane a row is a warp's: reductions without a block barrier.
constexpr int kWarpRowVectors = 8;
// Blocks per multiprocessor beyond which they loop: enough to fill it whatever the registers, few enough to start fast.
constexpr int kBlocksPerMultiprocessor = 16;

inline RowGrid row_grid(int64_t rows, int64_t columns, int vector, const Limits& limits) {
    RowGrid g{};
    g.threads = limits.block_threads;
    g.warp_per_row = ceil_div(columns, vector) <= kWarpRowVectors * kWarpThreads;
    const int64_t groups = g.warp_per_row ? ceil_div(rows, g.threads / kWarpThreads) : rows;
    g.blocks =
        std::max<int64_t>(1, std::min<int64_t>(groups, int64_t(limits.multiprocessors) * kBlocksPerMultiprocessor));
    return g;
}

}  // namespace camkd::cuda
