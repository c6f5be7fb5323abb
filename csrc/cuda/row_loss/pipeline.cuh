// The kernel for rows wider than a warp takes: warps with roles of their own, so that none waits for the sums of the
// others or for the exchange between the blocks of a row.
//
// Two rows are in flight, or more (RowGeometry::rows). Warps that hold rows sum up their part of one row, then write
// the gradient of the row before it and fetch a later one into its place. Meanwhile a merging warp adds up the sums of
// the block and of the group, and computes the weights, for which a row has the time of all work on another row. A
// recording warp computes losses, and looks up labels far ahead. Rows of a group are numbered 0, 1, 2, ...; a row takes
// the place (buffers, states and phases) of the one that many before it.
#pragma once

#include "gradient.cuh"
#include "label_statistics.cuh"
#include "minibatch.cuh"
#include "results.cuh"
#include "statistics.cuh"

namespace camkd::cuda {

// Phases by which the warps of a block meet, one of each for every place of a row.
struct RowPhases {
    Phase summed[kMostInPipeline];    // by the warps that hold the row
    Phase weighted[kMostInPipeline];  // by the merging warp, which has its coefficients
    Phase recorded[kMostInPipeline];  // by the recording warp, which needs its state no more
    Phase prepared;                   // by the recording warp: kRowsAtOnce rows can be read
    // Rows that are out of range
    Phase summed_again[kMostInPipeline], weighted_again[kMostInPipeline];
};
static_assert(sizeof(RowPhases) <= kPhasesBytes);

template <class T, int FixedK>
class PipelinedKernel {
    using Group = RowGroup<T, false, FixedK>;
    using Info = typename Group::Info;
    static constexpr int V = kVector<T>, K = FixedK;
    static constexpr int kLanes = kWarp / kRowsAtOnce;  // per row that is prepared
    static_assert(kLanes > K, "a lane per stream");

  public:
    CAMKD_DEVICE PipelinedKernel(const RowLaunch& launch)
        : group_{launch},
          label_statistics_(group_),
          statistics_(group_),
          exchange_(group_),
          results_(group_),
          gradient_(group_),
          minibatch_(group_) {}

    CAMKD_DEVICE void run() {
        const int role = group_.warp() - group_.warps();  // 0 merges, 1 records, others hold rows
        if (role == 0) {
            exchange_.start();
            if (group_.lane() == 0) open_phases();
            minibatch_.start();
        } else if (role == 1) {
            prepare(0);
            if (group_.lane() < row_stats::per_teacher) group_.batch_sums()[group_.lane()] = 0;
        }
        block_barrier();
        if (role == 0) {
            merge_rows();
            exchange_.end();
        } else if (role == 1) {
            record_rows();
        } else {
            hold_rows();
        }
        exchange_.finish();
        minibatch_.finish();
    }

  private:
    // --- the warps that hold rows ---

    CAMKD_DEVICE void hold_rows() {
        const int count = row_count();
        // The same part of every row, wherever in memory it lies
        const bool even = group_.launch.even && group_.launch.wide_out && args().grad_student != nullptr;
        Chunk part = group_.chunk_of(group_.even_columns(), 0, 0);
        keep_in_register(part.first);
        keep_in_register(part.held);
        for (int n = 0; n < rows(); ++n) {
            if (n < count) fetch(n);
            copies_end_group();
        }
        unsigned again = 0;
        int summed = 0, written = 0;
        while (written < count) {
#pragma unroll 1
            for (; summed < count && summed < written + kSummedAhead; ++summed) {
                // The copies of later rows go on
                const bool more = written + rows() > summed + 1;
                const int r = place(summed);
                const Info& row = info(summed);
                part.begin = r * part.count;
                if (row.kept) label_statistics_.sum_up(row, r, even ? part : group_.chunk_of(row, r, 0), more);
                arrive(&phases()->summed[r]);
            }
            // These are 1 or 2
            do {
                write(written, even, part, again);
                copies_end_group();
            } while (++written < count && (written & (group_.launch.geometry.gradients - 1)) != 0);
        }
    }

    // The gradient of row n, which makes its place free for another one.
    CAMKD_DEVICE void write(int n, bool even, Chunk& part, unsigned& again) const {
        const int r = place(n);
        const Info &row = info(n), &next = info(n + rows());
        phase_wait(&phases()->weighted[r], round(n));
        if (row.kept && group_.rows()[r].out_of_range) {
            statistics_.sum_up(row, r);
            arrive(&phases()->summed_again[r]);
            wait_again(phases()->weighted_again, n, again);
        } else if (even && row.kept) {
            part.begin = r * part.count;
            gradient_.write_even(row, next, r, part);
            return;
        }
        gradient_.write(row, next, r, 0);
    }

    CAMKD_DEVICE void fetch(int n) const {
        if (info(n).kept) group_.fetch_chunk(info(n), group_.chunk_of(info(n), place(n), 0));
    }

    // --- the merging warp ---

    CAMKD_DEVICE void merge_rows() {
        minibatch_.write_scalars();
        const int count = row_count();
        unsigned again = 0;
        for (int n = 0; n < count; ++n) {
            const int r = place(n);
            phase_wait(&phases()->summed[r], round(n));
            // The state in this place is that of an earlier row
            if (n >= rows()) phase_wait(&phases()->recorded[r], round(n) - 1);
            if (info(n).kept) label_statistics_.merge(exchange_, r);
            results_.compute_label_weights(info(n), r);
            // With the weights of this row the others need the one that takes its place
            const int next = n + rows();
            if (next % kRowsAtOnce == 0) phase_wait(&phases()->prepared, next / kRowsAtOnce - 1);
            arrive(&phases()->weighted[r]);
            if (is_out_of_range(n)) {
                wait_again(phases()->summed_again, n, again);
                statistics_.merge(exchange_, r);
                results_.compute_weights(info(n), r);
                arrive(&phases()->weighted_again[r]);
            }
        }
    }

    // --- the recording warp ---

    CAMKD_DEVICE void record_rows() {
        prepare(kRowsAtOnce);
        arrive(&phases()->prepared);
        const int count = row_count();
        unsigned again = 0;
        for (int n = 0; n < count; ++n) {
            const int r = place(n);
            phase_wait(&phases()->weighted[r], round(n));
            if (is_out_of_range(n)) wait_again(phases()->weighted_again, n, again);
            // The blocks of a group alternate
            if (n % group_.blocks() == group_rank()) results_.write_row_stats(info(n), r);
            arrive(&phases()->recorded[r]);
            if (n % kRowsAtOnce == kRowsAtOnce - 1) {
                prepare(n + 1 + kRowsAtOnce);
                arrive(&phases()->prepared);
            }
        }
    }

    // Fills in the infos of rows n, n + 1, ..., with a few lanes for each. Those that they replace are no longer read.
    CAMKD_DEVICE void prepare(int n) const {
        const int number = n + group_.lane() / kLanes, lane = group_.lane() % kLanes;
        const int64_t row = group_id() + int64_t(number) * group_.launch.groups;
        Info& to = info(number);
        RowLabels labels{};
        if (row < args().N)
            labels = row_labels(args().target, args().second, row, group_.launch.C, args().formula.ignore_index);
        const bool two = group_.two_labels() && labels.kept && labels.valid && labels.second >= 0;
        if (lane == 0) {
            to.row = row;
            to.kept = labels.kept;
            to.label_valid = labels.kept && labels.valid;
            to.label_vector = to.label_element = to.second_vector = -1;
            if (to.label_valid) {
                const int phase =
                    columns_of<T>(group_.launch.C, group_.launch.wide_in, row_address(args().streams[0], args().S, row))
                        .phase;
                const int column = int(labels.first) + phase, other = int(labels.second) + phase;
                to.label_vector = column / V;
                to.label_element = column % V;
                if (two) {
                    SecondInfo<K>& second = group_.second(to);
                    second.share = labels.share;
                    second.element = other % V;
                    to.second_vector = other / V;
                }
            }
        }
        bool near = true;
        if (labels.kept && lane <= K) {
            const Matrix& stream = args().streams[lane];
            const DType dtype = sizeof(T) == 2 ? Elements<T>::dtype : stream.dtype;
            const char* const address = row_address(stream, args().S, row);
            float logit = labels.valid ? load_element(address, labels.first, dtype) : NAN;
            if (two) {
                SecondInfo<K>& second = group_.second(to);
                second.logits[0][lane] = logit;
                second.logits[1][lane] = load_element(address, labels.second, dtype);
                logit = fmaxf(logit, second.logits[1][lane]);
            }
            const Reference reference(logit, group_.temperature().scale);
            to.address[lane] = address;
            to.logits.at[lane] = logit;
            to.logits.factors[lane] = reference.factor();
            near = !reference.far();
        }
        float far = near ? 0.0f : 1.0f;
        for (int other = kLanes / 2; other > 0; other /= 2) far = fmaxf(far, shuffle_xor(far, other));
        if (lane == 0) to.near = far == 0;
        warp_barrier();
    }

    // --- all ---

    CAMKD_DEVICE void open_phases() const {
        RowPhases* const all = phases();
        for (int r = 0; r < rows(); ++r) {
            phase_open(&all->summed[r], group_.warps());
            phase_open(&all->weighted[r], 1);
            phase_open(&all->recorded[r], 1);
            phase_open(&all->summed_again[r], group_.warps());
            phase_open(&all->weighted_again[r], 1);
        }
        phase_open(&all->prepared, 1);
    }

    // A warp arrives at a phase once for all its lanes.
    CAMKD_DEVICE void arrive(Phase* phase) const {
        warp_barrier();
        if (group_.lane() == 0) phase_arrive(phase);
    }

    // Waits for one of the phases of a row that is out of range. Bit r of `again` says whether an odd number of such
    // rows came before in its place.
    CAMKD_DEVICE void wait_again(Phase* phases, int n, unsigned& again) const {
        phase_wait(&phases[place(n)], int(again >> place(n) & 1));
        again ^= 1u << place(n);
    }

    CAMKD_DEVICE const RowLossArgs& args() const { return group_.launch.args; }
    // Rows of the group. They are too wide for more than an int counts.
    CAMKD_DEVICE int row_count() const {
        const int64_t after = args().N - group_id(), groups = group_.launch.groups;
        return after > 0 ? int((after + groups - 1) / groups) : 0;
    }
    // The group has this many rows in flight.
    CAMKD_DEVICE int rows() const { return group_.launch.geometry.rows; }
    // Row n takes this place among them, which round(n) rows had before.
    CAMKD_DEVICE int place(int n) const { return n - round(n) * rows(); }
    CAMKD_DEVICE int round(int n) const { return int(uint64_t(uint32_t(n)) * group_.launch.rows_reciprocal >> 32); }
    static_assert((kPreparedRows & (kPreparedRows - 1)) == 0);
    CAMKD_DEVICE Info& info(int n) const { return group_.infos(0)[n & (kPreparedRows - 1)]; }
    CAMKD_DEVICE bool is_out_of_range(int n) const { return info(n).kept && group_.rows()[place(n)].out_of_range; }
    CAMKD_DEVICE RowPhases* phases() const {
        return reinterpret_cast<RowPhases*>(shared_memory() + group_.launch.phases);
    }

    const Group group_;
    const LabelStatistics<T, false, FixedK> label_statistics_;
    const RowStatistics<T, false, FixedK> statistics_;
    RowExchange<Group, 8> exchange_;
    const RowResults<T, false, FixedK> results_;
    const RowGradient<T, false, FixedK> gradient_;
    const RowMinibatch<T, false, FixedK> minibatch_;
};

template <class T, int FixedK>
CAMKD_KERNEL(pipeline_threads(FixedK), 1)
pipelined_kernel(CAMKD_PARAMETER RowLaunch launch) {
    if constexpr (has_clusters()) PipelinedKernel<T, FixedK>(launch).run();
}

}  // namespace camkd::cuda
