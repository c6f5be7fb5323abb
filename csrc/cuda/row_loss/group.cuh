// What the threads that share a row know of each other: the launch, the rows in flight, and where in shared memory
// everything is.
#pragma once

#include "../api.h"
#include "../launch_table.h"
#include "fixed_k_passes.cuh"

namespace camkd::cuda {

struct RowLaunch {
    RowLossArgs args;
    int C;       // columns are counted in 32 bits on the device
    bool debug;  // assert that labels are valid
    RowGeometry geometry;
    Temperature temperature;
    bool single_cluster;  // the grid is one cluster, which counts the rows and adds them up itself
    bool wide_in;         // all inputs are aligned alike, so that rows are read in 16-byte vectors
    bool wide_out;        // and the residual is aligned like them
    // What follows from the above; a kernel takes it from here rather than keep it in registers.
    int groups;  // of the grid
    int shift;   // 1 << shift threads to a team
    // Where the parts of shared memory begin, in bytes; the stash comes first.
    int batch, labels, inbox, inbox_labels, outgoing, boxes, infos, rows, states;
};

// A row that is in flight, as its team must know it before it looks at a logit.
struct RowInfo {
    const char* address[kMaxStreams];
    int64_t row;
    // The label's column: member of the team that has it, its slot over all chunks, place in the vector; -1 for a
    // label outside [0, C).
    int label_member, label_slot, label_element;
    bool kept, label_valid;
};

// A row between its statistics and its residual.
struct RowState {
    RowSums<float> sums[kMaxStreams];
    RowResult<float> result;
    GradCoefficients<float> coefficients;
    Reference references[kMaxStreams];
    bool fast_path;  // nothing that only the sweeps for any row can do
};

// Shared memory: stash, logits at the label, what the blocks of a cluster send each other, rows in flight (this one and
// the next), warp states.
struct RowShared {
    static constexpr int pack_bytes = int(sizeof(Pack));
    static int streams_bytes(int K, bool fixed_k) { return (K + 1) * packs(fixed_k) * pack_bytes; }
    static int label_bytes(int K) { return label_packs(K) * pack_bytes; }

    // A stream's state takes so many packs on its way to other blocks: entropies are of no use to known kernels.
    CAMKD_HD_MEMBER int packs(bool fixed_k) { return fixed_k ? 1 : 2; }
    CAMKD_HD_MEMBER int label_packs(int K) { return (K + 4) / 4; }

    // What the launch table must know of it.
    static void measure(RowProblem& problem) {
        const int K = problem.K;
        const bool fixed_k = problem.fixed_k > 0;
        problem.row_bytes = int(2 * sizeof(RowInfo) + sizeof(RowState));
        problem.warp_bytes = int(2 * (K + 1) * sizeof(State));
        problem.block_bytes = pack_bytes + label_bytes(K);
        problem.cluster_bytes = 2 * label_bytes(K) + streams_bytes(K, fixed_k) + 2 * int(sizeof(Mailbox));
        problem.rank_bytes = 2 * streams_bytes(K, fixed_k);
    }

    // Fills in what follows from arguments and geometry.
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
        take(launch.batch, pack_bytes);
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

// `FixedK`: how many there are, for the sweeps of known_sweeps.cuh; 0 for any number, temperature and weighting.
template <class T, bool WarpPerRow, int FixedK>
struct RowGroup {
    static constexpr int V = kVector<T>;
    static constexpr int ArrayK = FixedK > 0 ? FixedK : 1;  // of what is never run where it is not known

    CAMKD_DEVICE int lane() const { return thread_id() % kWarp; }
    CAMKD_DEVICE int warp() const { return thread_id() / kWarp; }
    CAMKD_DEVICE int warps() const { return block_threads() / kWarp; }
    // Of a team; clusters of warp teams share nothing but the end of a whole batch.
    CAMKD_DEVICE int cluster() const { return has_clusters() && !WarpPerRow ? launch.geometry.cluster : 1; }
    CAMKD_DEVICE int members() const { return WarpPerRow ? kWarp : 1 << launch.shift; }
    CAMKD_DEVICE int shift() const { return WarpPerRow ? 5 : launch.shift; }
    CAMKD_DEVICE int member() const { return WarpPerRow ? lane() : rank * block_threads() + thread_id(); }
    // Which warp looks ahead, and which one merges: two where there are two.
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
    CAMKD_DEVICE RowInfo* infos(int parity) const {
        return reinterpret_cast<RowInfo*>(shared_memory() + launch.infos) +
               ((WarpPerRow ? 2 * warp() : 0) + parity) * rows_per_group();
    }
    CAMKD_DEVICE RowState* rows() const {
        return reinterpret_cast<RowState*>(shared_memory() + launch.rows) +
               (WarpPerRow ? warp() * rows_per_group() : 0);
    }
    // Two to a stream and warp: sums of all chunks so far, and those of a batch.
    CAMKD_DEVICE State* states(int warp, int chunk) const {
        return reinterpret_cast<State*>(shared_memory() + launch.states) + (2 * warp + chunk) * (teachers() + 1);
    }
    // Where the logit at the label of a row goes, in the block that has it.
    CAMKD_DEVICE float* label_at(int r, int k) const {
        return WarpPerRow ? &rows()[r].sums[k].label : reinterpret_cast<float*>(shared_memory() + launch.labels) + k;
    }
    // What this block sends of a stream, and what it was sent by the block of a rank.
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

    // Rows that the team has in flight together.
    CAMKD_DEVICE int rows_per_group() const { return WarpPerRow ? launch.geometry.rows : 1; }
    CAMKD_DEVICE int teachers() const { return FixedK > 0 ? FixedK : launch.args.K; }
    CAMKD_DEVICE const Temperature& temperature() const { return launch.temperature; }
    CAMKD_DEVICE bool entropy() const { return FixedK == 0 && launch.args.formula.weighting == Weighting::entropy; }
    CAMKD_DEVICE int chunks() const { return WarpPerRow ? 1 : launch.geometry.chunks; }

    CAMKD_DEVICE Chunk chunk_of(const RowInfo& info, int r, int b) const {
        const RowGeometry& g = launch.geometry;
        const Columns columns = columns_of<T>(launch.C, launch.wide_in, info.address[0]);
        const int first = (b * g.slots << shift()) + member(), left = columns.vectors - first;
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

    // The slot of batch b in which this thread has the label; none of its slots where another has it.
    CAMKD_DEVICE int label_slot(const RowInfo& info, int b) const {
        return member() == info.label_member ? info.label_slot - b * launch.geometry.slots : -1;
    }

    CAMKD_DEVICE float inverseT() const { return 1.0f / launch.args.formula.temperature; }

    // Two numbers of the batch, the same for all: 1 / rows that count, and what the residual is multiplied by.
    CAMKD_DEVICE float* batch_scalars() const { return reinterpret_cast<float*>(shared_memory() + launch.batch); }
    CAMKD_DEVICE float grad_scale() const { return batch_scalars()[1]; }

    const RowLaunch& launch;
    const int rank;  // of the block in its cluster
};

}  // namespace camkd::cuda
