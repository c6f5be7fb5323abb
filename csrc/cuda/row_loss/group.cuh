// What the threads of one row share: the launch parameters, the rows in flight, and the layout of shared memory.
// RowShared computes the layout on the host, RowGroup finds its parts on the device.
#pragma once

#include "../api.h"
#include "../batch_mean.cuh"
#include "../launch_table.h"
#include "fixed_k_passes.cuh"

namespace camkd::cuda {

struct RowLaunch {
    RowLossArgs args;
    int C;       // columns fit 32 bits on the device
    bool debug;  // assert that labels are valid
    RowGeometry geometry;
    Temperature temperature;
    bool single_cluster;      // the grid is one cluster, which also counts the labels and adds up the rows
    BatchCounters* counters;  // for the same in a larger grid; null: by other launches, or not at all
    bool wide_in;             // all inputs have the same alignment, so rows are read in 16-byte vectors
    bool wide_out;            // the gradient has that alignment too
    // Derived from the fields above; a kernel reads them from constant memory instead of holding them in registers.
    int groups;  // of the grid
    int shift;   // a group has 1 << shift threads
    // Offsets of the parts of shared memory, in bytes; the row buffers come first.
    int batch, labels, inbox, inbox_labels, outgoing, boxes, infos, rows, states;
};

// A row in flight: all that its group must know before it reads a logit.
struct RowInfo {
    const char* address[kMaxStreams];
    int64_t row;
    // Position of the label's column: group member, slot counted over all chunks, element of the vector. -1 for a label
    // outside [0, C).
    int label_member, label_slot, label_element;
    bool kept, label_valid;  // not ignored; in [0, C)
};

// A row between its statistics and its gradient.
struct RowState {
    RowSums<float> sums[kMaxStreams];
    RowResult<float> result;
    GradCoefficients<float> coefficients;
    Reference references[kMaxStreams];
    bool fast_path;                            // true if the fixed-K gradient pass can handle this row
    float batch_sums[row_stats::per_teacher];  // in a group's first one: loss, hard and soft over its rows so far
};

// Shared memory: row buffers, logits at the label, messages between the blocks of a cluster, rows in flight (current
// and next), states of the warps.
struct RowShared {
    static constexpr int pack_bytes = int(sizeof(Pack));
    static int streams_bytes(int K, bool fixed_k) { return (K + 1) * packs(fixed_k) * pack_bytes; }
    static int label_bytes(int K) { return label_packs(K) * pack_bytes; }

    // Packs per stream in a message to other blocks: max, sumT, sum1, cross; fixed-K kernels need no plogp.
    CAMKD_HD_MEMBER int packs(bool fixed_k) { return fixed_k ? 1 : 2; }
    CAMKD_HD_MEMBER int label_packs(int K) { return (K + 4) / 4; }

    // The sizes that the launch table needs.
    static void measure(RowProblem& problem) {
        const int K = problem.K;
        const bool fixed_k = problem.fixed_k > 0;
        problem.row_bytes = int(2 * sizeof(RowInfo) + sizeof(RowState));
        problem.warp_bytes = int(2 * (K + 1) * sizeof(State));
        problem.block_bytes = int(sizeof(BatchScalars)) + label_bytes(K);
        problem.cluster_bytes = 2 * label_bytes(K) + streams_bytes(K, fixed_k) + 2 * int(sizeof(Mailbox));
        problem.rank_bytes = 2 * streams_bytes(K, fixed_k);
    }

    // Fills in the derived fields and offsets of a launch.
    static void lay_out(RowLaunch& launch, const RowProblem& problem) {
        const RowGeometry& g = launch.geometry;
        const int K = problem.K, warps = g.threads / kWarpThreads, groups = g.warp_per_row ? warps : 1;
        launch.groups = int(g.warp_per_row ? g.blocks * warps : g.blocks / g.cluster);
        launch.shift = 0;
        while (1 << launch.shift < (g.warp_per_row ? kWarpThreads : g.threads * g.cluster)) ++launch.shift;
        int at = (K + 1) * g.rows * g.slots * g.threads * pack_bytes;
        const auto take = [&](int& offset, int bytes) {
            offset = at;
            at += bytes;
        };
        take(launch.batch, sizeof(BatchScalars));
        take(launch.labels, label_bytes(K));
        if (!g.warp_per_row && g.cluster > 1) {
            take(launch.inbox, g.cluster * problem.rank_bytes);
            take(launch.inbox_labels, 2 * label_bytes(K));
            take(launch.outgoing, streams_bytes(K, problem.fixed_k > 0));
            take(launch.boxes, 2 * int(sizeof(Mailbox)));
        }
        take(launch.infos, 2 * groups * g.rows * int(sizeof(RowInfo)));
        take(launch.rows, groups * g.rows * int(sizeof(RowState)));
        launch.states = at;
    }
};

// The threads that share a row: a warp (`WarpPerRow`), a block, or a cluster of blocks. `FixedK` is the number of
// teachers for the passes of fixed_k_passes.cuh; 0 selects the general passes: any K, temperature and weighting.
template <class T, bool WarpPerRow, int FixedK>
struct RowGroup {
    static constexpr int V = kVector<T>;
    static constexpr int ArrayK = FixedK > 0 ? FixedK : 1;  // array sizes of code that must compile for FixedK = 0 too

    CAMKD_DEVICE int lane() const { return thread_id() % kWarp; }
    CAMKD_DEVICE int warp() const { return thread_id() / kWarp; }
    CAMKD_DEVICE int warps() const { return block_threads() / kWarp; }
    // Blocks per group. With a warp per row the blocks of a cluster share only the end of the whole minibatch.
    CAMKD_DEVICE int cluster() const { return has_clusters() && !WarpPerRow ? launch.geometry.cluster : 1; }
    CAMKD_DEVICE int members() const { return WarpPerRow ? kWarp : 1 << launch.shift; }
    CAMKD_DEVICE int shift() const { return WarpPerRow ? 5 : launch.shift; }
    CAMKD_DEVICE int member() const { return WarpPerRow ? lane() : rank * block_threads() + thread_id(); }
    // The last warp prepares the next rows, the first one merges: two different warps where the block has two.
    CAMKD_DEVICE bool is_lookahead_warp() const { return WarpPerRow || warp() == warps() - 1; }
    CAMKD_DEVICE bool is_merging_warp() const { return WarpPerRow || warp() == 0; }
    CAMKD_DEVICE void barrier() const {
        if (WarpPerRow)
            warp_barrier();
        else
            block_barrier();
    }

    CAMKD_DEVICE RowBuffer buffer() const {
        const RowGeometry& g = launch.geometry;
        return {reinterpret_cast<Pack*>(shared_memory()) + thread_id(), rows_per_group() * g.slots, block_threads()};
    }
    // `parity` of the iteration: one set is in use while the other one is prepared.
    CAMKD_DEVICE RowInfo* infos(int parity) const {
        return reinterpret_cast<RowInfo*>(shared_memory() + launch.infos) +
               ((WarpPerRow ? 2 * warp() : 0) + parity) * rows_per_group();
    }
    CAMKD_DEVICE RowState* rows() const {
        return reinterpret_cast<RowState*>(shared_memory() + launch.rows) +
               (WarpPerRow ? warp() * rows_per_group() : 0);
    }
    CAMKD_DEVICE float* batch_sums() const { return rows()->batch_sums; }
    // Those of any group of the block.
    CAMKD_DEVICE const float* batch_sums(int group) const {
        return reinterpret_cast<RowState*>(shared_memory() + launch.rows)[group * rows_per_group()].batch_sums;
    }
    // The K + 1 states of a warp: 0 holds the sums over all chunks so far, 1 those of the current chunk.
    CAMKD_DEVICE State* states(int warp, int which) const {
        return reinterpret_cast<State*>(shared_memory() + launch.states) + (2 * warp + which) * (teachers() + 1);
    }
    // Stream k's logit at the label of row r, in the block that has it.
    CAMKD_DEVICE float* label_at(int r, int k) const {
        return WarpPerRow ? &rows()[r].sums[k].label : reinterpret_cast<float*>(shared_memory() + launch.labels) + k;
    }

    // Messages between the blocks of a cluster: those that this block sends about stream k, those from the block of a
    // rank. Exchanges alternate between two inboxes (RowStatistics::merge_blocks).
    CAMKD_DEVICE Pack* outgoing(int k) const {
        return reinterpret_cast<Pack*>(shared_memory() + launch.outgoing) + k * packs();
    }
    CAMKD_DEVICE Pack* inbox(int exchange, int rank, int k) const {
        const int i = (exchange % 2 * cluster() + rank) * (teachers() + 1) + k;
        return reinterpret_cast<Pack*>(shared_memory() + launch.inbox) + i * packs();
    }
    CAMKD_DEVICE Pack* inbox_labels(int exchange) const {
        return reinterpret_cast<Pack*>(shared_memory() + launch.inbox_labels) + exchange % 2 * label_packs();
    }
    CAMKD_DEVICE Mailbox* box(int exchange) const {
        return reinterpret_cast<Mailbox*>(shared_memory() + launch.boxes) + exchange % 2;
    }
    CAMKD_DEVICE int packs() const { return RowShared::packs(FixedK > 0); }
    CAMKD_DEVICE int label_packs() const { return RowShared::label_packs(teachers()); }

    // Rows that the group has in flight at once.
    CAMKD_DEVICE int rows_per_group() const { return WarpPerRow ? launch.geometry.rows : 1; }
    CAMKD_DEVICE int teachers() const { return FixedK > 0 ? FixedK : launch.args.K; }
    CAMKD_DEVICE const Temperature& temperature() const { return launch.temperature; }
    CAMKD_DEVICE float inverseT() const { return 1.0f / launch.args.formula.temperature; }
    CAMKD_DEVICE bool entropy() const { return FixedK == 0 && launch.args.formula.weighting == Weighting::entropy; }
    CAMKD_DEVICE int chunks() const { return WarpPerRow ? 1 : launch.geometry.chunks; }

    // This thread's vectors of chunk c of row r.
    CAMKD_DEVICE Chunk chunk_of(const RowInfo& info, int r, int c) const {
        const RowGeometry& g = launch.geometry;
        const Columns columns = columns_of<T>(launch.C, launch.wide_in, info.address[0]);
        const int first = (c * g.slots << shift()) + member(), left = columns.vectors - first;
        const int held = left > 0 ? (left + members() - 1) >> shift() : 0;
        return {columns, first, members(), r * g.slots, g.slots, held < g.slots ? held : g.slots};
    }

    CAMKD_DEVICE void fetch_slot(const RowInfo& info, const Chunk& chunk, int i) const {
        if (i >= chunk.held) return;
        if (whole_vector(chunk.columns, chunk.vector(i)))
            fetch_whole<T>(buffer(), chunk, i, info.address, teachers());
        else
            fetch_elements<T>(buffer(), chunk, i, launch.args.streams, info.address, teachers());
    }

    CAMKD_DEVICE void fetch_chunk(const RowInfo& info, const Chunk& chunk) const {
#pragma unroll 1
        for (int i = 0; i < chunk.held; ++i) fetch_slot(info, chunk, i);
    }

    // The slot of chunk c in which this thread has the label's column; outside 0 .. held - 1 if it has not.
    CAMKD_DEVICE int label_slot(const RowInfo& info, int c) const {
        return member() == info.label_member ? info.label_slot - c * launch.geometry.slots : -1;
    }

    CAMKD_DEVICE BatchScalars* batch_scalars() const {
        return reinterpret_cast<BatchScalars*>(shared_memory() + launch.batch);
    }
    CAMKD_DEVICE float grad_scale() const { return batch_scalars()->grad_scale; }

    const RowLaunch& launch;
    const int rank;  // of the block in its cluster
};

}  // namespace camkd::cuda
