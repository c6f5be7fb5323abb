// What the threads of one row share: the launch parameters, the rows in flight, and the layout of shared memory.
// RowShared computes the layout on the host, RowGroup finds its parts on the device.
#pragma once

#include "../api.h"
#include "../batch_mean.cuh"
#include "../launch_table.h"
#include "fixed_k_passes.cuh"
#include "group_memory.cuh"

namespace camkd::cuda {

struct RowLaunch {
    RowLossArgs args;
    int C;       // columns fit 32 bits on the device
    bool debug;  // assert that labels are valid
    RowGeometry geometry;
    Temperature temperature;
    bool single_cluster;       // the grid is one cluster, which also counts the labels and adds up the rows
    BatchCounters* counters;   // for the same in a larger grid; null: by other launches, or not at all
    int64_t labels_per_block;  // with counters, how many labels each block counts
    bool wide_in;              // all inputs have the same alignment, so rows are read in 16-byte vectors
    bool wide_out;             // the gradient has that alignment too
    bool even;                 // wide_in, and every row begins and ends at a 16-byte boundary
    // Derived from the fields above; a kernel reads them from constant memory instead of holding them in registers.
    int groups;                // of the grid
    int members;               // threads of a group
    uint32_t rows_reciprocal;  // of geometry.rows, in units of 2^-32 and rounded up: divides numbers of rows
    GroupMemory* memory;
    // Offsets of the parts of shared memory, in bytes; the row buffers come first.
    int batch, inbox, outgoing, boxes, infos, rows, states, label_sums, phases;
    int label_sums_bytes;             // of a warp
    int second_infos, second_states;  // if rows have two labels
};

// Array sizes of the structs below, and of code that must compile for FixedK = 0 too.
template <int FixedK>
constexpr int kTeachers = FixedK > 0 ? FixedK : kMaxTeachers;

// The logits of all streams at the label, NaN for invalid labels, and for the fast path the factors of these references
// (Reference::factor). A row of two labels has the larger one of both logits here: its other sums are then at least 1.
template <int FixedK>
struct alignas(Pack) LabelLogits {
    float at[kTeachers<FixedK> + 1];
    float factors[FixedK + 1];
};

// A row in flight: all that its group must know before it reads its vectors.
template <int FixedK>
struct alignas(Pack) RowInfo {
    LabelLogits<FixedK> logits;
    const char* address[kTeachers<FixedK> + 1];
    int64_t row;
    int second_vector;                // of the second label's column; -1 if there is none, and no SecondInfo
    int label_vector, label_element;  // position of the label's column; -1 for invalid labels
    bool kept, label_valid;           // as in RowLabels
    bool near;                        // fast path: no reference is far (Reference::far)
};

// A row of two labels has this besides its RowInfo.
template <int FixedK>
struct alignas(Pack) SecondInfo {
    float logits[2][kTeachers<FixedK> + 1];  // of all streams at both labels
    float share;                             // of the first label
    int element;                             // of the second label's column, in its vector

    // The average over both labels of what they are below a number, for one stream.
    CAMKD_DEVICE float below(float top, int stream) const {
        return mixed(share, top - logits[0][stream], top - logits[1][stream]);
    }
};

// A row of two labels has this besides its RowState.
struct alignas(Pack) SecondState {
    int64_t next_label;  // as RowState::next_label
    float next_mix;      // with it
    float gradient;      // at the second label's column
};

// grad_c as in GradCoefficients of row_math.h.
template <int FixedK>
struct alignas(Pack) RowCoefficients {
    float studentT, student1;
    float teacher[kTeachers<FixedK>];
};

// Merged sums of a row on the fast path, as in add_vectors.
template <int FixedK>
struct alignas(Pack) LabelSums {
    float of[kLabelSums<FixedK>];
};

// A row between its statistics and its gradient.
template <int FixedK>
struct RowState {
    LabelSums<FixedK> label_sums;
    RowCoefficients<FixedK> coefficients;
    float weights[kTeachers<FixedK>];
    float label_gradient;  // fast path: the gradient at the label's column
    bool out_of_range;     // the sums relative to the label are of no use, and those below are there
    State sums[kTeachers<FixedK> + 1];
    Reference references[kTeachers<FixedK> + 1];
    int64_t next_label;                        // of the row that takes this one's place after the next one
    float batch_sums[row_stats::per_teacher];  // in a group's first one: loss, hard and soft over its rows so far
};

// The layout of a block's shared memory. W: warps that hold rows. G: groups of the block, W with a warp per row, else
// 1. R: rows in flight of a group (RowGeometry::rows). B: blocks that share a row.
//
//   part           count                  struct        written by                 read by
//   row buffers    (K + 1) W R slots 32   Pack          the threads of the row     the same thread
//   batch          1                      BatchScalars  first or merging warp      all
//   inbox          2 B (K + 1) packs()    Pack          merging warps of B blocks  merging warp
//   outgoing       (K + 1) packs()        Pack          merging warp               merging warp, which sends it
//   boxes          2                      Mailbox       merging warps of B blocks  merging warp
//   infos          2 G R                  RowInfo       look-ahead warp            all
//   second_infos   2 G R                  SecondInfo    look-ahead warp            all
//   rows           G R                    RowState      merging, look-ahead warp   all, for the gradient
//   second_states  G R                    SecondState   merging, look-ahead warp   all, for the gradient
//   states         2 W (K + 1)            State         each warp its own          merging warp
//   label_sums     W                      LabelSums     each warp its own          merging warp
//   phases         1                      RowPhases     all                        all
//
// With a warp per row, a row's warp merges and looks ahead. In the pipelined kernel the recording warp looks ahead.
// There is an inbox, an outgoing message and boxes for B > 1, and second_infos and second_states for rows of two
// labels.
//
// row_loss_kernel uses all but the phases. label_sums lie in the place of states: a row needs only one of them at once.
// warp_rows_kernel uses the row buffers, batch and the place of rows, for SharedSums. Rows that take the general passes
// also need infos, states and rows themselves.
// pipelined_kernel uses all but the boxes, as blocks that share a row are cooperative. It has kPreparedRows infos, and
// W R label_sums in a place of their own, because one row's are written while another row may need states.
struct RowShared {
    static constexpr int pack_bytes = int(sizeof(Pack));
    static int streams_bytes(int K, bool fixed_k) { return (K + 1) * packs(fixed_k) * pack_bytes; }

    // Packs per stream in a message to other blocks: max, sumT, sum1, cross; fixed-K kernels need no plogp.
    CAMKD_HD_MEMBER int packs(bool fixed_k) { return fixed_k ? 1 : 2; }

    // The sizes that the launch table needs.
    static void measure(RowProblem& problem, bool two_labels) {
        const int K = problem.K;
        const bool fixed_k = problem.fixed_k > 0;
        with_fixed_k(problem.fixed_k, [&](auto k) {
            problem.second_info_bytes = two_labels ? int(sizeof(SecondInfo<k.value>)) : 0;
            problem.info_bytes = int(sizeof(RowInfo<k.value>)) + problem.second_info_bytes;
            problem.second_state_bytes = two_labels ? int(sizeof(SecondState)) : 0;
            problem.state_bytes = int(sizeof(RowState<k.value>)) + problem.second_state_bytes;
            problem.label_sums_bytes = int(sizeof(LabelSums<k.value>));
        });
        problem.warp_bytes = int(2 * (K + 1) * sizeof(State));
        problem.block_bytes = int(sizeof(BatchScalars));
        problem.group_bytes = streams_bytes(K, fixed_k) + 2 * int(sizeof(Mailbox));
        problem.rank_bytes = 2 * streams_bytes(K, fixed_k);
        problem.group_words = streams_bytes(K, fixed_k) / int(sizeof(float));
    }

    // Fills in the derived fields and offsets of a launch.
    static void lay_out(RowLaunch& launch, const RowProblem& problem) {
        const RowGeometry& g = launch.geometry;
        const int K = problem.K, warps = g.threads / kWarpThreads, groups = g.warp_per_row ? warps : 1;
        launch.groups = int(g.warp_per_row ? g.blocks * warps : g.blocks / g.blocks_per_group);
        launch.rows_reciprocal = g.pipelined ? uint32_t(((uint64_t(1) << 32) + g.rows - 1) / g.rows) : 0;
        launch.members = g.warp_per_row ? kWarpThreads : g.threads * g.blocks_per_group;
        int at = (K + 1) * g.rows * g.slots * g.threads * pack_bytes;
        const auto take = [&](int& offset, int bytes) {
            offset = at;
            at += bytes;
        };
        take(launch.batch, sizeof(BatchScalars));
        if (!g.warp_per_row && g.blocks_per_group > 1) {
            take(launch.inbox, g.blocks_per_group * problem.rank_bytes);
            take(launch.outgoing, streams_bytes(K, problem.fixed_k > 0));
            take(launch.boxes, 2 * int(sizeof(Mailbox)));
        }
        const int rows = groups * g.rows, infos = g.pipelined ? kPreparedRows : 2 * rows;
        take(launch.infos, infos * (problem.info_bytes - problem.second_info_bytes));
        take(launch.second_infos, infos * problem.second_info_bytes);
        take(launch.rows, rows * (problem.state_bytes - problem.second_state_bytes));
        take(launch.second_states, rows * problem.second_state_bytes);
        take(launch.states, warps * problem.warp_bytes);
        launch.label_sums = launch.states;  // in their place, but where another row's may be there too
        launch.label_sums_bytes = problem.warp_bytes;
        if (g.pipelined) {
            launch.label_sums_bytes = problem.label_sums_bytes;
            take(launch.label_sums, g.rows * warps * problem.label_sums_bytes);
            take(launch.phases, kPhasesBytes);
        }
    }
};

// The threads that share a row: a warp (`WarpPerRow`), a block, a cluster of blocks, or a cooperative group of them.
// `FixedK` is the number of teachers for the passes of fixed_k_passes.cuh; 0 selects the general passes: any K,
// temperature and weighting.
template <class T, bool WarpPerRow, int FixedK>
struct RowGroup {
    static constexpr int V = kVector<T>;
    using Info = RowInfo<FixedK>;
    using RowState = cuda::RowState<FixedK>;

    CAMKD_DEVICE int lane() const { return thread_id() % kWarp; }
    CAMKD_DEVICE int warp() const { return thread_id() / kWarp; }
    // This many warps of the block hold rows.
    CAMKD_DEVICE int warps() const { return launch.geometry.threads / kWarp; }
    // How many blocks share a row, as a cluster or a cooperative group. 1 with a warp per row, whose
    // RowGeometry::blocks_per_group share only the end of the minibatch.
    CAMKD_DEVICE int blocks() const { return has_clusters() && !WarpPerRow ? launch.geometry.blocks_per_group : 1; }
    // Whether these blocks are a cooperative group, which exchanges through memory, and no cluster.
    CAMKD_DEVICE bool cooperative() const { return has_clusters() && !WarpPerRow && launch.geometry.cooperative; }
    CAMKD_DEVICE int members() const { return WarpPerRow ? kWarp : launch.members; }
    CAMKD_DEVICE int member() const {
        return WarpPerRow ? lane() : group_rank() * launch.geometry.threads + thread_id();
    }
    // The group's number in the grid. Warps are numbered across the blocks, so that the rows that are left for a last
    // round are spread over all multiprocessors.
    CAMKD_DEVICE int index() const {
        return WarpPerRow ? warp() * int(launch.geometry.blocks) + int(block_id()) : group_id();
    }
    CAMKD_DEVICE int warp_of_group() const { return WarpPerRow ? 0 : group_rank() * warps() + warp(); }
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
        const int streams = teachers() + 1, of_warp = launch.geometry.rows * launch.geometry.slots * streams * kWarp;
        return {reinterpret_cast<Pack*>(shared_memory()) + warp() * of_warp + lane(), streams};
    }
    // `parity` of the iteration: one set is in use while the other one is prepared.
    CAMKD_DEVICE Info* infos(int parity) const {
        return reinterpret_cast<Info*>(shared_memory() + launch.infos) +
               ((WarpPerRow ? 2 * warp() : 0) + parity) * rows_per_group();
    }
    // Whether rows may have two labels.
    CAMKD_DEVICE bool two_labels() const { return launch.args.second.target != nullptr; }
    CAMKD_DEVICE bool has_two_labels(const Info& info) const { return two_labels() && info.second_vector >= 0; }
    // A row for which has_two_labels is true has this SecondInfo.
    CAMKD_DEVICE SecondInfo<FixedK>& second(const Info& info) const {
        const int64_t index = &info - reinterpret_cast<const Info*>(shared_memory() + launch.infos);
        return reinterpret_cast<SecondInfo<FixedK>*>(shared_memory() + launch.second_infos)[index];
    }
    CAMKD_DEVICE SecondState* second_states() const {
        return reinterpret_cast<SecondState*>(shared_memory() + launch.second_states) +
               (WarpPerRow ? warp() * rows_per_group() : 0);
    }
    CAMKD_DEVICE SecondState& second_state(const RowState& state) const {
        const int64_t index = &state - reinterpret_cast<const RowState*>(shared_memory() + launch.rows);
        return reinterpret_cast<SecondState*>(shared_memory() + launch.second_states)[index];
    }
    CAMKD_DEVICE RowState* rows() const {
        return reinterpret_cast<RowState*>(shared_memory() + launch.rows) +
               (WarpPerRow ? warp() * rows_per_group() : 0);
    }
    CAMKD_DEVICE float* batch_sums() const { return rows()->batch_sums; }
    // Each group of the block has batch_sums of its own.
    CAMKD_DEVICE const float* batch_sums(int group) const {
        return reinterpret_cast<RowState*>(shared_memory() + launch.rows)[group * rows_per_group()].batch_sums;
    }
    // The K + 1 states of a warp: 0 holds the sums over all chunks so far, 1 those of the current chunk.
    CAMKD_DEVICE State* states(int warp, int which) const {
        return reinterpret_cast<State*>(shared_memory() + launch.states) + (2 * warp + which) * (teachers() + 1);
    }
    // The fast path's sums of a warp, of row r.
    CAMKD_DEVICE float* label_sums(int warp, int r) const {
        return reinterpret_cast<float*>(shared_memory() + launch.label_sums +
                                        (r * warps() + warp) * launch.label_sums_bytes);
    }

    // Messages between the blocks of a group: those that this block sends about stream k, those from the block of a
    // rank. Exchanges alternate between two inboxes (RowExchange).
    CAMKD_DEVICE Pack* outgoing(int k) const {
        return reinterpret_cast<Pack*>(shared_memory() + launch.outgoing) + k * packs();
    }
    CAMKD_DEVICE Pack* inbox(uint32_t exchange, int rank, int k) const {
        const int i = (int(exchange & 1) * blocks() + rank) * (teachers() + 1) + k;
        return reinterpret_cast<Pack*>(shared_memory() + launch.inbox) + i * packs();
    }
    CAMKD_DEVICE Mailbox* box(uint32_t exchange) const {
        return reinterpret_cast<Mailbox*>(shared_memory() + launch.boxes) + (exchange & 1);
    }
    CAMKD_DEVICE int packs() const { return RowShared::packs(FixedK > 0); }
    CAMKD_DEVICE int message_floats() const { return (teachers() + 1) * packs() * int(sizeof(Pack) / sizeof(float)); }

    // Rows that the group has in flight at once.
    CAMKD_DEVICE int rows_per_group() const { return WarpPerRow ? launch.geometry.rows : 1; }
    CAMKD_DEVICE int teachers() const { return FixedK > 0 ? FixedK : launch.args.K; }
    CAMKD_DEVICE const Temperature& temperature() const { return launch.temperature; }
    CAMKD_DEVICE float inverseT() const { return 1.0f / launch.args.formula.temperature; }
    CAMKD_DEVICE bool entropy() const { return FixedK == 0 && launch.args.formula.weighting == Weighting::entropy; }
    CAMKD_DEVICE int chunks() const { return WarpPerRow ? 1 : launch.geometry.chunks; }

    // This thread's vectors of chunk c of row r.
    CAMKD_DEVICE Chunk chunk_of(const Info& info, int r, int c) const {
        const Columns columns = launch.even ? even_columns() : columns_of<T>(launch.C, launch.wide_in, info.address[0]);
        return chunk_of(columns, r, c);
    }
    // Every row has these columns, if rows are even.
    CAMKD_DEVICE Columns even_columns() const { return {launch.C, 0, launch.C / V, 0, launch.C / V}; }
    CAMKD_DEVICE Chunk chunk_of(const Columns& columns, int r, int c) const {
        const int slots = launch.geometry.slots;
        // In units of a vector per lane: the row's end, and the part of this warp. The last warps may have less, as
        // they prepare the next row meanwhile.
        const int row_end = (columns.vectors + kWarp - 1) / kWarp;
        int begin = warp_of_group() * slots;
        if (chunks() > 1) begin += c * slots * (members() / kWarp);
        if (begin > row_end) begin = row_end;
        const int end = WarpPerRow || begin + slots > row_end ? row_end : begin + slots;
        const int first = begin * kWarp + lane();
        // Lanes beyond the end of the row lack the last vector of its last warp
        const int held = end - begin - (first + (end - begin - 1) * kWarp >= columns.vectors ? 1 : 0);
        return {columns, first, r * slots, slots, held > 0 ? held : 0};
    }

    CAMKD_DEVICE void fetch_slot(const Info& info, const Chunk& chunk, int i) const {
        if (i >= chunk.held) return;
        if (whole_vector(chunk.columns, chunk.vector(i)))
            fetch_whole<T>(buffer(), chunk, i, info.address, teachers());
        else
            fetch_elements<T>(buffer(), chunk, i, launch.args.streams, info.address, teachers());
    }

    CAMKD_DEVICE void fetch_chunk(const Info& info, const Chunk& chunk) const {
#pragma unroll 1
        for (int i = 0; i < chunk.held; ++i) fetch_slot(info, chunk, i);
    }

    // The slot of a chunk in which this thread has a vector; outside 0 .. held - 1 if it has not.
    CAMKD_DEVICE static int slot_of(int vector, const Chunk& chunk) {
        const int distance = vector - chunk.first;
        return distance % kWarp == 0 ? distance / kWarp : -1;
    }

    CAMKD_DEVICE BatchScalars* batch_scalars() const {
        return reinterpret_cast<BatchScalars*>(shared_memory() + launch.batch);
    }
    CAMKD_DEVICE float grad_scale() const { return batch_scalars()->grad_scale; }

    const RowLaunch& launch;
};

}  // namespace camkd::cuda
