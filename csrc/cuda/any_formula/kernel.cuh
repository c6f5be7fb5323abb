// The logit loss of every formula but the paper's (is_basic): all divergences, weightings and logit maps, for any
// number of teachers. A warp or a block takes a row and reads it twice, or three times for a divergence of a mixture:
// for the statistics, for the sums over the mixtures, and for the gradient. The gradient may be written over the
// student's logits. Start reading at FormulaKernel::run.
#pragma once

#include "../launch_table.h"
#include "passes.cuh"

namespace camkd::cuda {

// A row between its passes, in shared memory.
struct alignas(Pack) FormulaRow {
    const char* addresses[kMaxStreams];  // of the row in each stream
    RowNumbers numbers;
    RowResult<float> result;
    float batch_sums[row_stats::per_teacher];  // loss, hard and soft over the group's rows so far
};

// What the warps of a group send each other.
struct alignas(Pack) WarpSums {
    static constexpr int kNumbers = 4;
    float max[kMaxStreams];
    float of[kMaxStreams][kNumbers];
};

// The layout of a block's shared memory: the BatchScalars, WarpSums of each warp, a FormulaRow of each group, OwnSums
// of each thread.
struct FormulaShared {
    CAMKD_HD_MEMBER int rows_at(int threads) {
        return int(sizeof(BatchScalars)) + threads / kWarpThreads * int(sizeof(WarpSums));
    }
    CAMKD_HD_MEMBER int groups(int threads, bool warp_per_row) { return warp_per_row ? threads / kWarpThreads : 1; }
    CAMKD_HD_MEMBER int own_sums_at(int threads, bool warp_per_row) {
        return rows_at(threads) + groups(threads, warp_per_row) * int(sizeof(FormulaRow));
    }
    CAMKD_HD_MEMBER int bytes(int threads, bool warp_per_row, int K) {
        return own_sums_at(threads, warp_per_row) + K * OwnSums::kNumbers * threads * int(sizeof(float));
    }
};

template <class T>
class FormulaKernel {
    static constexpr int V = kVector<T>;

  public:
    CAMKD_DEVICE FormulaKernel(const FormulaLaunch& launch) : launch_(launch), group_(launch.warp_per_row) {}

    CAMKD_DEVICE void run() {
        const RowLossArgs& args = launch_.args;
        if (is_last())
            for (float& sum : row().batch_sums) sum = 0;
        if (thread_id() / kWarp == 0) {
            if (launch_.counters && args.batch.counts)
                count_labels_of_block(args, launch_.labels_per_block, launch_.counters);
            write_batch_scalars(args, batch_factor(args, launch_.counters), batch_scalars());
        }
        block_barrier();
        for (int64_t n = group_.index; n < args.N; n += group_.count) {
            const RowLabels labels = row_labels(args.target, args.second, n, launch_.C, args.formula.ignore_index);
            if (launch_.debug && args.shard == Shard::none) check_label(!labels.kept || labels.valid);
            if (labels.kept)
                evaluate(n, labels);
            else
                clear(n);
        }
        if (launch_.counters)
            add_up_blocks(args, launch_.counters, batch_scalars(), groups(),
                          [&](int group, int i) { return rows()[group].batch_sums[i]; });
    }

  private:
    CAMKD_DEVICE void evaluate(int64_t n, const RowLabels& labels) const {
        const RowLossArgs& args = launch_.args;
        const Formula& formula = args.formula;
        FormulaRow& row = this->row();
        RowNumbers& numbers = row.numbers;
        // Find the row
        if (group_.member <= args.K) row.addresses[group_.member] = row_address(args.streams[group_.member], args.S, n);
        if (formula.weighting == Weighting::given && group_.member < args.K)
            row.result.weights[group_.member] =
                args.weights[group_.member * args.weight_stride_k + n * args.weight_stride_n];
        group_.barrier();
        // Sum up
        if (args.shard == Shard::none || args.shard == Shard::sums) {
            State student;
            sum_up<T>(launch_, group_, reader(), own_sums(), inverseT(), student);
            merge(labels, student);
        } else {
            read_sums(n);
        }
        if (is_mixture(formula) && (args.shard == Shard::none || args.shard == Shard::mixtures)) {
            mix<T>(launch_, group_, reader(), own_sums(), numbers);
            merge_mixtures();
        }
        if (writes_sums(args)) {
            write_sums(n);
            return;
        }
        // Compute the weights and the coefficients of the gradient
        const bool valid = args.shard == Shard::none ? labels.valid : !std::isnan(numbers.sums[0].label);
        const float label_nan = valid ? 0.0f : NAN, grad_scale = batch_scalars()->grad_scale;
        if (group_.member == 0)
            compute_weights<ScalarMath>(formula, args.K, numbers.sums[0], numbers.sums + 1, label_nan, grad_scale,
                                        row.result, numbers.coefficients);
        group_.barrier();
        // Compute the losses, for which the gradient does not wait
        if (is_last()) {
            compute_losses<ScalarMath>(formula, args.K, numbers.sums[0], numbers.sums + 1, label_nan, row.result);
            write_row_stats(n, row.result);
        }
        if (args.grad_student)
            write_gradient<T>(launch_, group_, reader(), numbers, labels, label_coefficient(formula, grad_scale),
                              gradient_of(n));
        group_.barrier();  // all have read before the next row overwrites
    }

    // Reduces the statistics of all threads to those of the row.
    CAMKD_DEVICE void merge(const RowLabels& labels, State& student) const {
        const Formula& formula = launch_.args.formula;
        const int K = launch_.args.K;
        const OwnSums own = own_sums();
        for (int k = 0; k <= K; ++k) {
            const float max = warp_max(k == 0 ? student.max : own.at(k, OwnSums::kMax));
            if (lane() == 0) warps()[warp()].max[k] = max;
        }
        group_.barrier();
        const State before = student;
        for (int k = 0; k <= K; ++k) {
            State state;
            if (k == 0) {
                move_to(formula, student, max_of_row(0), inverseT());
                state = student;
            } else {
                state = own.load(k);
                move_to(formula, state, max_of_row(k), before, student.max, inverseT());
            }
            send(k, 0, state.sumT);
            send(k, 1, state.sum1);
            send(k, 2, state.cross);
            send(k, 3, state.plogp);
        }
        group_.barrier();
        if (group_.member <= K) {
            const int k = group_.member;
            RowSums<float> sums{};
            sums.max = max_of_row(k);
            sums.sumT = sum_of_row(k, 0);
            sums.sum1 = sum_of_row(k, 1);
            sums.cross = sum_of_row(k, 2);
            sums.plogp = sum_of_row(k, 3);
            sums.label = label_distance(labels, k, sums.max);
            row().numbers.sums[k] = sums;
            row().numbers.inverse[k] = 1.0f / sums.sumT;
        }
        group_.barrier();
    }

    CAMKD_DEVICE void merge_mixtures() const {
        const int K = launch_.args.K, k = group_.member;
        for (int i = 1; i <= K; ++i) {
            send(i, 0, own_sums().at(i, OwnSums::kDivergence));
            send(i, 1, own_sums().at(i, OwnSums::kCenter));
        }
        group_.barrier();
        if (k >= 1 && k <= K) {
            row().numbers.sums[k].cross = sum_of_row(k, 0);
            row().numbers.sums[k].center = sum_of_row(k, 1);
        }
        group_.barrier();
    }

    // The sums of a row of which the columns here are a shard.
    CAMKD_DEVICE void read_sums(int64_t n) const {
        if (group_.member <= launch_.args.K) {
            const int k = group_.member;
            RowSums<float> sums;
#pragma unroll
            for (int i = 0; i < kRowSums; ++i) as_array(sums)[i] = sum_of(launch_.args, k, i, n);
            row().numbers.sums[k] = sums;
            row().numbers.inverse[k] = 1.0f / row().numbers.sums[k].sumT;
        }
        group_.barrier();
    }

    CAMKD_DEVICE void write_sums(int64_t n) const {
        if (group_.member <= launch_.args.K) {
            const int k = group_.member;
            RowSums<float> sums = row().numbers.sums[k];
#pragma unroll
            for (int i = 0; i < kRowSums; ++i) sum_of(launch_.args, k, i, n) = as_array(sums)[i];
        }
        group_.barrier();  // before another row's sums take their place
    }

    // Adds number i of stream k over the warp, for sum_of_row.
    CAMKD_DEVICE void send(int k, int i, float number) const {
        const float sum = warp_sum(number);
        if (lane() == 0) warps()[warp()].of[k][i] = sum;
    }
    // Warps in order, so the bits do not depend on the schedule.
    CAMKD_DEVICE float sum_of_row(int k, int i) const {
        float sum = 0;
        for (int w = 0; w < group_.members / kWarp; ++w) sum += warps()[w].of[k][i];
        return sum;
    }
    CAMKD_DEVICE float max_of_row(int k) const {
        float max = -INFINITY;
        for (int w = 0; w < group_.members / kWarp; ++w) max = fmaxf(max, warps()[w].max[k]);
        return max;
    }

    // The logit of stream k at the label minus the maximum, or the average of both labels; NaN for invalid ones. Read
    // before any gradient is written, which may be there.
    CAMKD_DEVICE float label_distance(const RowLabels& labels, int k, float max) const {
        if (!labels.valid) return NAN;
        const LogitCurve curve(launch_.args.formula.logit_maps[k]);
        const auto distance = [&](int64_t c) {
            const float x = load_element(row().addresses[k], c, launch_.args.streams[k].dtype);
            return (launch_.args.formula.maps ? curve(x) : x) - finite(max);
        };
        const float first = distance(labels.first);
        return labels.second < 0 ? first : mixed(labels.share, first, distance(labels.second));
    }

    // An ignored row: every output is 0.
    CAMKD_DEVICE void clear(int64_t n) const {
        const RowLossArgs& args = launch_.args;
        if (writes_sums(args)) {
            if (group_.member <= args.K)
                for (int i = 0; i < kRowSums; ++i) sum_of(args, group_.member, i, n) = 0;
            return;
        }
        if (is_last()) {
            for (int i = 0; i < row_stats::count(args.K, args.formula.entropy); ++i) args.row_stats[i * args.N + n] = 0;
            if (args.batch.losses) args.batch.losses[n] = 0;
        }
        if (!args.grad_student) return;
        char* const out = gradient_of(n);
        const Columns columns = columns_of<T>(launch_.C, launch_.wide_out, out);
        const float zeros[V] = {};
        for (int v = group_.member; v < columns.vectors; v += group_.members)
            store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);
    }

    // Writes a row's results, by the group's last thread, like everything that reads batch_sums.
    CAMKD_DEVICE void write_row_stats(int64_t n, const RowResult<float>& result) const {
        const RowLossArgs& args = launch_.args;
        const int K = args.K;
        const auto write = [&](int i, float number) { args.row_stats[i * args.N + n] = number; };
        write(row_stats::loss, result.loss);
        write(row_stats::hard, result.hard);
        write(row_stats::soft, result.soft);
        for (int k = 0; k < K; ++k) {
            write(row_stats::divergence(k), result.divergence[k]);
            write(row_stats::teacher_ce(K, k), result.teacher_ce[k]);
            write(row_stats::weight(K, k), result.weights[k]);
        }
        if (args.formula.entropy) write(row_stats::entropy(K), result.entropy);
        if (args.batch.losses) args.batch.losses[n] = result.loss;
        float* const sums = row().batch_sums;
        sums[row_stats::loss] += result.loss;
        sums[row_stats::hard] += result.hard;
        sums[row_stats::soft] += result.soft;
    }

    CAMKD_DEVICE char* gradient_of(int64_t n) const {
        return static_cast<char*>(launch_.args.grad_student) +
               n * launch_.C * element_bytes(launch_.args.streams[0].dtype);
    }

    CAMKD_DEVICE int lane() const { return thread_id() % kWarp; }
    CAMKD_DEVICE int warp() const { return group_.member / kWarp; }
    CAMKD_DEVICE bool is_last() const { return group_.member == group_.members - 1; }
    CAMKD_DEVICE float inverseT() const { return 1.0f / launch_.args.formula.temperature; }
    CAMKD_DEVICE RowReader<T> reader() const { return RowReader<T>(launch_, group_, row().addresses); }

    CAMKD_DEVICE int groups() const { return FormulaShared::groups(block_threads(), group_.is_warp); }
    CAMKD_DEVICE BatchScalars* batch_scalars() const { return reinterpret_cast<BatchScalars*>(shared_memory()); }
    // Each warp of the group has WarpSums of its own here.
    CAMKD_DEVICE WarpSums* warps() const {
        return reinterpret_cast<WarpSums*>(batch_scalars() + 1) + (group_.is_warp ? thread_id() / kWarp : 0);
    }
    CAMKD_DEVICE FormulaRow* rows() const {
        return reinterpret_cast<FormulaRow*>(shared_memory() + FormulaShared::rows_at(block_threads()));
    }
    CAMKD_DEVICE FormulaRow& row() const { return rows()[group_.is_warp ? thread_id() / kWarp : 0]; }
    CAMKD_DEVICE OwnSums own_sums() const {
        return {
            reinterpret_cast<float*>(shared_memory() + FormulaShared::own_sums_at(block_threads(), group_.is_warp)) +
            thread_id()};
    }

    const FormulaLaunch& launch_;
    const ThreadGroup group_;
};

template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
any_formula_kernel(CAMKD_PARAMETER FormulaLaunch launch) {
    FormulaKernel<T>(launch).run();
}

}  // namespace camkd::cuda
