// The launch table: threads, blocks, clusters and shared memory of every kernel as a function of shape and device, with
// the reasons. Host only, no CUDA header: the tests read it too.
#pragma once

#include <algorithm>
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

// 256 threads of up to 80 registers: three blocks to a multiprocessor, so that one loads while others compute.
constexpr int kBlockThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kWarpThreads = 32;

// A warp takes whole rows up to this many vectors per lane, 2048 columns of 16 bits or 1024 of fp32 for the usual K =
// 3: no block barrier is needed, and the rows of 13 warps at least fit on a multiprocessor.
constexpr int kWarpVectors = 8;
constexpr int kWarpStash = 32 * 1024;  // bytes per warp: with more teachers rows go to blocks sooner
// Rows that a warp finishes together, one to a lane: what is K wide costs as much for 4 rows as for 1. Wide rows hide
// it.
constexpr int kRowsTogether = 4;
constexpr int kRowsTogetherStash = 8 * 1024;  // bytes of stash per warp that such rows may take
// Up to this many elements of all K + 1 tensors per block (two or three rows of 100 classes per warp) one cluster does
// the whole batch, and adds up its rows: the idle multiprocessors cost less than a second launch, about 3 us.
constexpr int64_t kOneClusterElements = 8 * 1024;
constexpr int kOneClusterBlocks = 8;  // the largest portable cluster

// How row_loss runs. A team is a warp, a block or a cluster of blocks; it takes `rows` rows at a time.
struct RowGeometry {
    int threads;      // of a block
    int64_t blocks;   // of the grid; fewer than teams of rows: they loop
    int cluster;      // blocks of a cluster
    bool warp_teams;  // a team is a warp
    int rows;         // rows that a team has in flight together; 1 unless warp_teams
    int slots;        // vectors of a row that each thread of a team stashes
    int batches;      // times that the stash is filled for a row: 1 means one read of global memory
    int shared;       // bytes
};

struct RowProblem {
    int64_t N;
    int C, K;
    int vectors;      // 16 bytes each, that a row touches at most
    int row_bytes;    // shared memory beside the stash: of each row in flight,
    int warp_bytes;   // of each warp,
    int block_bytes;  // and of each block
    bool wants_mean;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Bytes of shared memory of `threads` threads that stash `slots` vectors each of `rows` rows.
inline int64_t row_shared(const RowProblem& p, int threads, int slots, int rows, bool warp_teams) {
    const int warps = threads / kWarpThreads;
    const int64_t stash = int64_t(p.K + 1) * rows * slots * threads * 16;
    return stash + int64_t(warp_teams ? warps * rows : 1) * p.row_bytes + int64_t(warps) * p.warp_bytes + p.block_bytes;
}

inline int64_t share_of(const Limits& limits, int blocks) {
    return std::min<int64_t>(limits.shared_per_multiprocessor / blocks - 1024, limits.shared_per_block);
}

// The grid is left at one team per set of rows; `limit_grid` fits it to what is resident.
inline RowGeometry row_geometry(const RowProblem& p, const Limits& limits) {
    RowGeometry g{};
    const int64_t vectors = p.vectors;
    const int per_lane = int(ceil_div(vectors, kWarpThreads));
    const int64_t warp_stash = int64_t(p.K + 1) * per_lane * kWarpThreads * 16;
    g.cluster = g.rows = g.batches = 1;
    g.threads = limits.block_threads;
    if (per_lane <= kWarpVectors && warp_stash <= kWarpStash) {
        g.warp_teams = true;
        g.slots = per_lane;
        const int64_t together = std::min<int64_t>(kRowsTogether, kRowsTogetherStash / warp_stash);
        // Not at the price of idle multiprocessors.
        const int64_t warps = int64_t(limits.multiprocessors) * kBlocksPerMultiprocessor * g.threads / kWarpThreads;
        g.rows = int(std::max<int64_t>(1, std::min(together, p.N / warps)));
        while (g.threads > kWarpThreads && row_shared(p, g.threads, g.slots, g.rows, true) > limits.shared_per_block)
            g.threads /= 2;
        if (row_shared(p, g.threads, g.slots, g.rows, true) <= limits.shared_per_block) {
            g.shared = int(row_shared(p, g.threads, g.slots, g.rows, true));
            g.blocks = ceil_div(p.N, int64_t(g.rows) * (g.threads / kWarpThreads));
            const int most = std::min(limits.cluster, kOneClusterBlocks);
            if (p.wants_mean && p.N * p.C * (p.K + 1) <= kOneClusterElements * most) {
                g.cluster = int(std::min<int64_t>(g.blocks, most));
                while (g.cluster & (g.cluster - 1)) ++g.cluster;  // clusters come in powers of two
                g.blocks = g.cluster;
            }
            return g;
        }
        g.warp_teams = false;
        g.rows = 1;
        g.threads = limits.block_threads;
    }
    // One read: as few blocks to a row as let `kBlocksPerMultiprocessor` of them share a multiprocessor; failing that
    // two, failing that one, whose loads then overlap with its own residual only.
    for (int blocks = kBlocksPerMultiprocessor; blocks > 0; --blocks) {
        for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
            g.slots = int(ceil_div(vectors, int64_t(g.threads) * cluster));
            const int64_t shared = row_shared(p, g.threads, g.slots, 1, false);
            if (shared > share_of(limits, blocks)) continue;
            g.cluster = cluster;
            g.shared = int(shared);
            g.blocks = p.N * cluster;
            return g;
        }
    }
    // Two reads: the stash holds what a block works on, and its last part is not read again.
    g.slots = int(ceil_div(vectors, g.threads));
    const int64_t per_slot = row_shared(p, g.threads, 1, 1, false) - row_shared(p, g.threads, 0, 1, false);
    const int64_t room = share_of(limits, kBlocksPerMultiprocessor) - row_shared(p, g.threads, 0, 1, false);
    const int most = int(std::max<int64_t>(1, room / per_slot));
    g.batches = int(ceil_div(g.slots, most));
    g.slots = int(ceil_div(g.slots, g.batches));
    g.shared = int(row_shared(p, g.threads, g.slots, 1, false));
    // As few rows under way as keep the second read in L2, but one block on every multiprocessor at least.
    const int64_t row = vectors * 16 * (p.K + 1);
    g.blocks = std::min<int64_t>(p.N, std::max<int64_t>(limits.multiprocessors, limits.l2 / row));
    return g;
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
struct SweepGeometry {
    int threads;
    int64_t blocks;
    bool warp_teams;
};

// Up to this many vectors per lane a row is a warp's: reductions without a block barrier.
constexpr int kSweepVectors = 8;
// Blocks per multiprocessor beyond which they loop: enough to fill it whatever the registers, few enough to start fast.
constexpr int kSweepBlocks = 16;

inline SweepGeometry sweep_geometry(int64_t rows, int64_t columns, int vector, const Limits& limits) {
    SweepGeometry g{};
    g.threads = limits.block_threads;
    g.warp_teams = ceil_div(columns, vector) <= kSweepVectors * kWarpThreads;
    const int64_t teams = g.warp_teams ? ceil_div(rows, g.threads / kWarpThreads) : rows;
    g.blocks = std::max<int64_t>(1, std::min<int64_t>(teams, int64_t(limits.multiprocessors) * kSweepBlocks));
    return g;
}

}  // namespace camkd::cuda
