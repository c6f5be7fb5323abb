// The launch table: threads, blocks, clusters and shared memory of every kernel as a function of shape and device, with
// the reasons. Limits per architecture belong here too. Host only and free of CUDA headers, so that the tests can use
// it.
//
// A new architecture: limits here, instructions in device.cuh, the default targets in cuda.cmake, and ARCHITECTURES in
// tests/support/gpu.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace camkd::cuda {

// The properties of a device that the table depends on, filled in by runtime.cpp.
struct Limits {
    int multiprocessors;
    int shared_per_block, shared_per_multiprocessor;  // bytes; each block takes 1 KB more than it requests
    int l2;                                           // bytes
    int cluster;                                      // most blocks of a cluster; 1 before sm_90
    int block_threads;                                // kBlockThreads; fewer in the tests on the host
    int least_cooperative;  // kLeastCooperative; 0 for no cooperative groups; fewer in the tests on the host
    int pipeline_warps;     // kPipelineWarps; 0 for no pipelined kernels; fewer in the tests on the host
};

// 256 threads of up to 80 registers: three blocks per multiprocessor, so that one loads while others compute. With more
// teachers, whose sums a thread keeps in registers, and in the general kernels (0), two blocks fit.
constexpr int kBlockThreads = 256;
constexpr int kMaxFixedK = 5;
constexpr int blocks_per_multiprocessor(int fixed_k) {
    return fixed_k >= 1 && fixed_k <= 3 ? 3 : 2;
}
constexpr int kWarpThreads = 32;
constexpr int kMaxSlots = 32;  // vectors of a row in a thread's buffer, which marks some of them in the bits of a word

// Calls f with the number of teachers that a kernel is compiled for, or 0, as a compile-time constant.
template <int K>
struct TeacherCount {
    static constexpr int value = K;
};
template <class F, int K = kMaxFixedK>
auto with_fixed_k(int fixed_k, F f) {
    if constexpr (K > 0) {
        if (fixed_k != K) return with_fixed_k<F, K - 1>(fixed_k, f);
    }
    return f(TeacherCount<K>());
}

// Most blocks of a cluster on a device of this major compute capability. 8 are portable; Hopper (9.x) and data-centre
// Blackwell (10.x) also take 16, consumer Blackwell (12.x) does not.
constexpr int kPortableCluster = 8;
constexpr int largest_cluster(int major) {
    return major < 9 ? 1 : major < 12 ? 16 : kPortableCluster;
}

// A warp takes whole rows of up to this many vectors per lane, 2048 columns of 16 bits or 1024 of fp32 for the usual
// K = 3. Such rows need no block barrier, and those of at least 13 warps fit on a multiprocessor.
constexpr int kWarpVectors = 8;
constexpr int kWarpBufferBytes = 32 * 1024;  // bytes per warp; with more teachers, narrower rows already take a block
// Rows that a warp has in flight at once, so that the loads of one overlap the arithmetic of the other. Wide rows
// overlap by themselves.
constexpr int kRowsPerWarp = 2;
constexpr int kRowsPerWarpBytes = 8 * 1024;  // bytes of row buffers per warp, for rows in flight together
// Up to this many elements of all K + 1 tensors per block (two or three rows of 100 classes per warp) one cluster
// computes the whole minibatch and its means: idle multiprocessors cost less than a second launch, about 3 us.
constexpr int64_t kOneClusterElements = 8 * 1024;

// How row_loss runs. The threads of a group share a row: a warp, a block or several blocks.
struct RowGeometry {
    int threads;     // of a block
    int64_t blocks;  // of the grid; with fewer groups than rows, groups loop
    // How many blocks share a row, as a cluster or as a cooperative group. With a warp per row, how many blocks finish
    // the minibatch together, as the only cluster of the grid. 1 if every block is by itself.
    int blocks_per_group;
    bool cooperative;   // blocks that share a row exchange through memory
    bool pipelined;     // by the kernel in pipeline.cuh; blocks have kHelperWarps besides
    bool warp_per_row;  // a group is a warp
    int rows;           // rows that a group has in flight at once; 1 unless warp_per_row or pipelined
    int gradients;      // pipelined: those that a warp writes before it sums up further rows
    int slots;          // vectors of a row in each thread's buffer
    int chunks;         // times that the buffer is filled for a row; 1 means that global memory is read once
    int shared;         // bytes
};

// A geometry to try instead of the cheapest one, where it fits a kernel whose warps hold rows: warps of a block,
// vectors in each thread's buffer for a row, and for the pipelined kernel the rows and the gradients. 0: as the table
// says.
struct RowTrial {
    int warps, slots, rows, gradients;

    bool any() const { return warps > 0 || slots > 0 || rows > 0 || gradients > 0; }
    bool admits(int of_block, int of_thread) const {
        return (warps == 0 || warps == of_block) && (slots == 0 || slots == of_thread);
    }
};

// What the geometry depends on: the shape, and the sizes that RowShared::measure fills in.
struct RowProblem {
    int64_t N;
    int C, K;
    int vectors;  // 16-byte vectors that a row touches at most
    int vector;   // elements per vector
    int fixed_k;  // K if the kernel is compiled for it, 0 for the general kernel
    bool needs_mean;
    // Bytes of shared memory besides the row buffers: per row in flight (two infos, one state), warp and block; per
    // block of a group of several, and there again per rank.
    int info_bytes, state_bytes, warp_bytes, block_bytes, group_bytes, rank_bytes, label_sums_bytes;
    int second_info_bytes, second_state_bytes;  // of the first two: for rows of two labels
    int group_words;                            // of a block's message to its cooperative group
};

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Shared memory of a block, in bytes, whose threads buffer `slots` vectors each of `rows` rows. `blocks_per_group` is
// 1 with a warp per row.
inline int64_t row_shared(const RowProblem& p, int threads, int slots, int rows, bool warp_per_row,
                          int blocks_per_group) {
    const int warps = threads / kWarpThreads;
    const int64_t buffer = int64_t(p.K + 1) * rows * slots * threads * 16;
    const int64_t exchange = blocks_per_group > 1 ? p.group_bytes + int64_t(blocks_per_group) * p.rank_bytes : 0;
    return buffer + int64_t(warp_per_row ? warps * rows : 1) * (2 * p.info_bytes + p.state_bytes) +
           int64_t(warps) * p.warp_bytes + p.block_bytes + exchange;
}

inline int64_t shared_of_resident(const Limits& limits, int blocks) {
    return std::min<int64_t>(limits.shared_per_multiprocessor / blocks - 1024, limits.shared_per_block);
}

// Warps resident on a multiprocessor, in blocks of `threads` with `shared` bytes each.
inline int resident_warps(const RowProblem& p, const Limits& limits, int threads, int64_t shared) {
    const int64_t by_registers = int64_t(limits.block_threads) * blocks_per_multiprocessor(p.fixed_k) / threads;
    const int64_t by_memory = limits.shared_per_multiprocessor / (shared + 1024);
    return int(std::min(by_registers, by_memory)) * (threads / kWarpThreads);
}

// Cost of a row among others, in units of the time in which a warp processes one vector per lane of every stream. The
// reductions and addresses of a warp cost as much as one such vector of 16-bit logits. Idle slots count, because lanes
// wait for each other. With fewer than 16 warps per multiprocessor the latency of a block's serial parts is no longer
// hidden. Fitted to measurements on an H200.
inline double row_cost(const RowProblem& p, int warps, int64_t slots, int chunks, int resident) {
    const double work = double(warps) * (double(slots) + chunks * 8.0 / p.vector);
    const double latency = 1 + 0.41 * std::pow(std::max(24 - resident, 0) / 16.0, 3.5);
    return work * latency * (chunks > 1 ? 1.15 : 1.0);
}

// A warp per row, in blocks of the size at which most warps are resident. Returns false if rows are too wide for that.
inline bool warp_geometry(const RowProblem& p, const Limits& limits, const RowTrial& trial, RowGeometry& g) {
    const int per_lane = int(ceil_div(p.vectors, kWarpThreads));
    const int64_t warp_buffer = int64_t(p.K + 1) * per_lane * kWarpThreads * 16;
    if (per_lane > kWarpVectors || warp_buffer > kWarpBufferBytes) return false;
    g.warp_per_row = true;
    g.slots = per_lane;
    g.blocks_per_group = g.chunks = 1;
    const int64_t rows = std::min<int64_t>(kRowsPerWarp, kRowsPerWarpBytes / warp_buffer);
    // More rows per warp must not leave multiprocessors idle.
    const int64_t warps =
        int64_t(limits.multiprocessors) * blocks_per_multiprocessor(p.fixed_k) * limits.block_threads / kWarpThreads;
    g.rows = int(std::max<int64_t>(1, std::min(rows, p.N / warps)));
    const int largest =
        trial.warps > 0 ? std::min(trial.warps * kWarpThreads, limits.block_threads) : limits.block_threads;
    int most = 0;
    for (int threads = largest; threads >= kWarpThreads; threads = trial.warps > 0 ? 0 : threads / 2) {
        const int64_t shared = row_shared(p, threads, g.slots, g.rows, true, 1);
        if (shared > limits.shared_per_block) continue;
        const int resident = resident_warps(p, limits, threads, shared);
        if (8 * resident <= 9 * most) continue;  // smaller blocks only if clearly more warps fit
        most = resident;
        g.threads = threads;
        g.shared = int(shared);
    }
    if (most == 0) return false;
    g.blocks = ceil_div(p.N, int64_t(g.rows) * (g.threads / kWarpThreads));
    const int blocks = std::min(limits.cluster, kPortableCluster);
    if (p.needs_mean && p.N * p.C * (p.K + 1) <= kOneClusterElements * blocks) {
        g.blocks_per_group = int(std::min<int64_t>(g.blocks, blocks));
        while (g.blocks_per_group & (g.blocks_per_group - 1)) ++g.blocks_per_group;  // cluster sizes are powers of two
        g.blocks = g.blocks_per_group;
    }
    return true;
}

// A cooperative group may have any number of blocks and leaves few places idle, while a cluster must fit into one of
// the GPU's processing clusters: those of 16 blocks use 336 of the 396 places for 256 threads on an H200, smaller ones
// most of them. Rows take one if a cluster is too small for them, or if they need its 16 blocks.
constexpr int kLeastCooperative = 12, kLargestCooperative = 64;
constexpr int kGroupWords = 1 << 14;  // for the messages of a launch, in two boxes for each block

inline int64_t group_blocks(const RowProblem& p) {
    return kGroupWords / (2 * p.group_words);
}

inline double used_places(const RowGeometry& g, int64_t places) {
    if (g.cooperative) return double(places / g.blocks_per_group * g.blocks_per_group) / double(places);
    return g.blocks_per_group > kPortableCluster ? 0.85 : 1.0;
}

// Blocks of the pipelined kernel: warps that hold rows, and two that help them. The largest are a multiple of four
// warps, for which the compiler divides the registers: 96 of a thread, or 128 with more teachers.
constexpr int kPipelineWarps = 18, kHelperWarps = 2;
constexpr int pipeline_warps(int fixed_k) {
    return fixed_k <= 3 ? kPipelineWarps : kPipelineWarps - 4;
}
constexpr int pipeline_threads(int fixed_k) {
    return (pipeline_warps(fixed_k) + kHelperWarps) * kWarpThreads;
}
constexpr int kRowsInPipeline = 2, kMostInPipeline = 4;
// Rows that a warp has summed up when it waits for the weights of the first of them, which come meanwhile. It needs the
// copies of as many, which have the more time the more rows are in flight and the more gradients come before.
constexpr int kSummedAhead = 2;
constexpr int kGradientsAtOnce = 1;
constexpr int kRowsAtOnce = 4;                  // that are looked up together
constexpr int kPreparedRows = 4 * kRowsAtOnce;  // of which is known what RowInfo says
constexpr int kPhasesBytes = 256;

inline int64_t pipeline_shared(const RowProblem& p, int warps, int slots, int rows, int blocks) {
    return row_shared(p, warps * kWarpThreads, slots, rows, false, blocks) +
           (kPreparedRows - 2) * int64_t(p.info_bytes) + (rows - 1) * int64_t(p.state_bytes) +
           int64_t(rows) * warps * p.label_sums_bytes + kPhasesBytes;
}

// The helping warps of a block cost a row this much, in the units of row_cost. Fitted to measurements on an H200.
constexpr double kHelperCost = 3;

// The pipelined kernel: blocks of different sizes, of which several may share a row or a multiprocessor. Returns false
// for fewer rows than fill the pipelines.
inline bool pipeline_geometry(const RowProblem& p, const Limits& limits, const RowTrial& trial, RowGeometry& best) {
    const int64_t per_lane = ceil_div(p.vectors, kWarpThreads);
    const int most_warps = std::min(limits.pipeline_warps, pipeline_warps(p.fixed_k));
    const int rows = trial.rows > 0 ? trial.rows : kRowsInPipeline;
    const int64_t most_blocks =
        limits.least_cooperative > 0 ? std::min<int64_t>(kLargestCooperative, group_blocks(p)) : 1;
    double least = INFINITY;
    // With fewer warps than four their helpers have too little to do.
    for (int slots = 1; p.fixed_k > 0 && slots <= std::min<int64_t>(kMaxSlots, per_lane / 4); ++slots) {
        bool fits = false;
        for (int most = most_warps; 2 * most > most_warps; --most) {
            const int64_t blocks = ceil_div(per_lane, int64_t(slots) * most);
            if (blocks > most_blocks) break;
            const int warps = most = int(ceil_div(per_lane, blocks * slots));
            const int64_t shared = pipeline_shared(p, warps, slots, rows, int(blocks));
            if (shared > limits.shared_per_block) continue;
            fits = true;
            if (!trial.admits(warps, slots)) continue;
            const int64_t fitting = std::min<int64_t>(limits.shared_per_multiprocessor / (shared + 1024),
                                                      (most_warps + kHelperWarps) / (warps + kHelperWarps));
            const int64_t resident = std::max<int64_t>(fitting, 1);
            const int64_t places = limits.multiprocessors * resident, groups = places / blocks;
            if (groups == 0 || p.N < rows * groups) continue;
            const double work = row_cost(p, warps * int(blocks), slots, 1, warps * int(resident));
            const double cost = (work + kHelperCost * double(blocks)) * double(places) / double(groups * blocks);
            if (cost >= 0.98 * least) continue;
            least = cost;
            best = {};
            best.threads = warps * kWarpThreads;
            best.blocks = p.N * blocks;
            best.blocks_per_group = int(blocks);
            best.cooperative = blocks > 1;
            best.pipelined = true;
            best.rows = rows;
            best.gradients = trial.gradients > 0 ? trial.gradients : kGradientsAtOnce;
            best.slots = slots;
            best.chunks = 1;
            best.shared = int(shared);
        }
        if (!fits && least < INFINITY) break;
    }
    return least < INFINITY;
}

// Picks the cheapest geometry; throws if none fits, as on a device with little shared memory. The grid has one group
// per set of rows; limit_grid reduces it to the resident blocks.
inline RowGeometry row_geometry(const RowProblem& p, const Limits& limits, const RowTrial& trial = {}) {
    RowGeometry best{};
    if (warp_geometry(p, limits, trial, best) || pipeline_geometry(p, limits, trial, best)) return best;
    double least = INFINITY;
    const auto consider = [&](RowGeometry g, int64_t shared, int64_t slots) {
        if (shared > limits.shared_per_block || g.slots > kMaxSlots) return;
        const int resident = resident_warps(p, limits, g.threads, shared), of_block = g.threads / kWarpThreads;
        const int64_t places = int64_t(limits.multiprocessors) * resident / of_block;
        if (g.cooperative && std::min(places, group_blocks(p)) < g.blocks_per_group) return;
        const int warps = of_block * g.blocks_per_group;
        const double cost = row_cost(p, warps, slots, g.chunks, resident) / used_places(g, places);
        if (cost >= 0.95 * least) return;  // earlier candidates are simpler: large blocks, small clusters, one read
        least = cost;
        best = g;
        best.shared = int(shared);
    };
    RowGeometry g{};
    g.rows = g.chunks = 1;
    // One read: the row fits a block or a cluster. In smaller blocks fewer warps take part in the reductions.
    const int least_threads = std::min(limits.block_threads, kBlockThreads / 2);
    for (g.threads = limits.block_threads; g.threads >= least_threads; g.threads /= 2) {
        for (g.blocks_per_group = 1; g.blocks_per_group <= limits.cluster; g.blocks_per_group *= 2) {
            g.slots = int(std::min<int64_t>(ceil_div(p.vectors, int64_t(g.threads) * g.blocks_per_group), 1 << 16));
            g.blocks = p.N * g.blocks_per_group;
            consider(g, row_shared(p, g.threads, g.slots, 1, false, g.blocks_per_group), g.slots);
        }
    }
    // One read by a cooperative group.
    g.cooperative = true;
    g.threads = limits.block_threads;
    for (g.slots = 1; limits.least_cooperative > 0 && g.slots <= kMaxSlots; ++g.slots) {
        const int64_t wanted = ceil_div(p.vectors, int64_t(g.threads) * g.slots);
        g.blocks_per_group = int(std::min<int64_t>(wanted, kLargestCooperative + 1));
        g.blocks = p.N * g.blocks_per_group;
        if (g.blocks_per_group < limits.least_cooperative || g.blocks_per_group > kLargestCooperative) continue;
        consider(g, row_shared(p, g.threads, g.slots, 1, false, g.blocks_per_group), g.slots);
    }
    g.cooperative = false;
    // Two reads: the row passes through the buffers in chunks. The last one stays there and is not read again.
    g.blocks_per_group = 1;
    const int64_t slots = ceil_div(p.vectors, g.threads);
    const int64_t fixed = row_shared(p, g.threads, 0, 1, false, 1);
    const int64_t per_slot = row_shared(p, g.threads, 1, 1, false, 1) - fixed;
    for (int blocks = blocks_per_multiprocessor(p.fixed_k); blocks > 0; --blocks) {
        const int64_t fitting = (shared_of_resident(limits, blocks) - fixed) / per_slot;
        const int64_t room = std::clamp<int64_t>(fitting, 1, kMaxSlots);
        g.chunks = int(ceil_div(slots, room));
        if (g.chunks == 1) continue;
        g.slots = int(ceil_div(slots, g.chunks));
        // Few enough rows in flight for the second read to hit L2, unless that would leave multiprocessors idle.
        const int64_t row = int64_t(p.vectors) * 16 * (p.K + 1), in_cache = limits.l2 / row;
        g.blocks = in_cache < limits.multiprocessors ? p.N : std::min(p.N, in_cache);
        consider(g, row_shared(p, g.threads, g.slots, 1, false, 1), slots);
    }
    if (best.threads == 0)
        throw std::runtime_error("camkd_fast: a row of " + std::to_string(p.K) + " teachers needs a block with more " +
                                 "shared memory than the device's " + std::to_string(limits.shared_per_block) +
                                 " bytes");
    return best;
}

// No more blocks than are resident at once (a multiple of a group's). Rows are distributed evenly, so a second wave
// would double the time.
inline void limit_grid(RowGeometry& g, int64_t resident) {
    g.blocks =
        std::max<int64_t>(g.blocks_per_group, std::min(g.blocks, resident / g.blocks_per_group * g.blocks_per_group));
}

// Numbers that a launch for N rows may write to BatchOutput::others: three, and three for each of its blocks, of which
// there are at most kMaxBlocks for a multiprocessor and a largest cooperative group for a row.
constexpr int kMaxBlocks = 32;
inline int64_t batch_floats(int64_t N, const Limits& limits) {
    static_assert(kLargestCooperative >= largest_cluster(9));
    return 3 + 3 * std::min<int64_t>(N * kLargestCooperative, int64_t(limits.multiprocessors) * kMaxBlocks);
}

// In launches of their own, the count and the sums of a minibatch take one block each, with as many threads as
// possible: they only wait for memory.
constexpr int kBatchThreads = 1024;

inline int batch_threads(const Limits& limits) {
    return std::min(kBatchThreads, limits.block_threads * (kBatchThreads / kBlockThreads));
}

// How the other kernels run: a warp or a block per row.
struct RowGrid {
    int threads;
    int64_t blocks;
    bool warp_per_row;
};

// Rows of up to this many vectors per lane take a warp, whose reductions need no block barrier.
constexpr int kWarpRowVectors = 8;
// The most blocks per multiprocessor; with more rows, blocks loop. Enough to fill it whatever the registers, and few
// enough to start fast.
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

// The feature maps: a warp or a block per sample, or several blocks where samples are few and large.
struct FeatureGrid {
    int threads;
    int64_t blocks;
    bool warp_per_row;
    int parts;  // of each sample
};

// Elements of a step of the feature kernel: one access of 16 bytes in 16-bit types, two in float.
constexpr int kFeatureStep = 8;
// Blocks per multiprocessor below which samples are divided: three are resident, and one more evens out the last wave.
constexpr int kFeatureBlocks = 4;
constexpr int kFeaturePartSteps = 2;  // fewest steps per thread of a part

// `items`: samples of all K teachers. `widest`: their most values. `scratch`: room for partial errors.
inline FeatureGrid feature_grid(int64_t items, int64_t widest, int64_t scratch, const Limits& limits) {
    FeatureGrid g{};
    g.threads = limits.block_threads;
    g.parts = 1;
    g.warp_per_row = widest <= int64_t(kWarpRowVectors) * kWarpThreads * kFeatureStep;
    if (!g.warp_per_row) {
        const int64_t wanted = int64_t(limits.multiprocessors) * kFeatureBlocks / items;
        const int64_t possible = widest / (int64_t(g.threads) * kFeatureStep * kFeaturePartSteps);
        g.parts = int(std::max<int64_t>(1, std::min({wanted, possible, scratch / items})));
    }
    const int64_t groups = g.warp_per_row ? ceil_div(items, g.threads / kWarpThreads) : items * g.parts;
    g.blocks = std::min<int64_t>(groups, int64_t(limits.multiprocessors) * kBlocksPerMultiprocessor);
    return g;
}

}  // namespace camkd::cuda
