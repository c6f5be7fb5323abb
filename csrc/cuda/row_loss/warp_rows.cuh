// The fast path of narrow rows in a kernel of its own: a warp takes one row after the other and keeps all that it knows
// of it in registers. While it writes the gradient of a row, it fetches the one that takes its place in the buffers.
//
// WarpRows runs launches whose rows are all alike (even_rows.cuh), RowKernel the others. Single rows that are ignored,
// have an invalid label or leave the safe range of the sums take the general passes.
#pragma once

#include <cstddef>

#include "even_rows.cuh"
#include "gradient.cuh"
#include "minibatch.cuh"
#include "results.cuh"
#include "shared_sums.cuh"
#include "statistics.cuh"

namespace camkd::cuda {

template <class T, int FixedK>
class WarpRows {
    using Group = RowGroup<T, true, FixedK>;
    using Info = typename Group::Info;
    using RowState = typename Group::RowState;
    using Results = RowResults<T, true, FixedK>;
    using Rows = EvenRows<T, FixedK>;
    using Role = LaneRole<FixedK>;
    static constexpr int K = FixedK, V = kVector<T>, kIgnored = Rows::kIgnored;

  public:
    CAMKD_DEVICE WarpRows(const RowLaunch& launch)
        : group_{launch},
          rows_(group_),
          statistics_(group_),
          results_(group_),
          gradient_(group_),
          minibatch_(group_),
          role_(group_.lane()) {}

    CAMKD_DEVICE void run() {
        start();
        for (;;) {
            with_power(group_.temperature().power, [&](auto power) { run_fast<decltype(power)::value>(); });
            if (!ready_) make_ready();
            if (row_ >= rows_.count()) break;
            run_general();
        }
        store_batch_sums();
        minibatch_.finish();
    }

  private:
    CAMKD_DEVICE void start() {
        row_ = group_.index() * group_.rows_per_group();
        column_ = rows_.column_of(rows_.label_of(row_));
        next_column_ = two_rows() ? rows_.column_of(rows_.label_of(row_ + 1)) : kIgnored;
        buffer_ = group_.buffer().first;
        if (column_ != kIgnored) rows_.fetch(row_, buffer_);
        copies_end_group();
        if (next_column_ != kIgnored) rows_.fetch(row_ + 1, other_buffer());
        copies_end_group();
        // While they arrive
        if (group_.warp() == 0) minibatch_.start();
    }

    // Rows in their order, until one needs the general passes or none is left.
    template <int P>
    CAMKD_DEVICE void run_fast() {
        const RowLossArgs& args = group_.launch.args;
        const float scale = group_.temperature().scale;
#pragma unroll 1
        while (row_ < rows_.count() && column_ >= 0) {
            role_.keep();
            const int64_t label = rows_.label_of(row_ + rows_.step());  // long before it is needed
            if (two_rows())
                copies_wait_but_last_group();
            else
                copies_wait();
            warp_barrier();
            // Sum up
            const int slots = rows_.held();
            const T* const at_label = rows_.in_buffer(buffer_, column_);
            LabelLogits<K> logits;
#pragma unroll
            for (int k = 0; k <= K; ++k) logits.at[k] = Rows::at(at_label, k);
            const float sum = sum_up<P>(logits, slots);
            // Share the sums
            const float logit = Rows::at(at_label, role_.stream());
            const Reference reference(logit, scale);
            const Temperature temperature{scale, 1 / scale, P};
            const bool far = warp_any(reference.far());
            const SharedSum mine(sum, reference, temperature);
            const float mass = temperature.mass(logit, reference.factor(), sum);
            SharedSum* const shared = shared_sums();
            if (role_.shares()) shared[role_.sum()] = mine;
            warp_barrier();
            if (__builtin_expect(!ready_, 0)) make_ready();
            const SharedSums<K> sums(shared);
            if (far || !Results::in_range(sums.total, sums.total_cross)) return;
            float weights[K];
            compute_weights(sums, weights);
            write_row_stats(mine, mass, sums, shared, weights);
            // Write the gradient, and fetch the row that comes into the buffers
            const int fetched = rows_.column_of(label);
            if (args.grad_student) {
                float gradient;
                const float of_student = shuffle(mass, Role::lane_of(0, kSum1));
                const FixedKRow<K> numbers(logits, scale, coefficients_of(sums, of_student, weights, gradient));
                if (fetched == kIgnored)
                    rows_.template write_gradient<P, false>(numbers, row_, 0, buffer_, slots);
                else
                    rows_.template write_gradient<P, true>(numbers, row_, row_ + rows_.step(), buffer_, slots);
                // The label's column; its vector was written by this thread too
                if (rows_.has(column_)) store_element(rows_.gradient_of(row_), column_, Rows::kDtype, gradient);
            } else if (fetched != kIgnored) {
                rows_.fetch(row_ + rows_.step(), buffer_);
            }
            advance(fetched);
        }
    }

    // Sums a row up; each lane returns one of the sums.
    template <int P>
    CAMKD_DEVICE float sum_up(const LabelLogits<K>& logits, int slots) const {
        const float scale = group_.temperature().scale;
        float at[K + 1], sums[Role::count];
        label_references<K>(logits.at, scale, at);
#pragma unroll
        for (int i = 0; i < Role::count; ++i) sums[i] = 0;
        add_vectors<T, K, P>({buffer_, K + 1}, {{}, 0, 0, slots, slots}, scale, at, sums);
        if (P == 1) {
#pragma unroll
            for (int k = 0; k <= K; ++k) sums[label_sum(k, kSum1)] = sums[label_sum(k, kSumT)];
        }
        return warp_fold(sums, group_.lane());
    }

    CAMKD_DEVICE void compute_weights(const SharedSums<K>& sums, float (&weights)[K]) const {
        const Weighting weighting = group_.launch.args.formula.weighting;
        if (weighting == Weighting::confidence && K > 1) {
            float masses[K];
#pragma unroll
            for (int k = 0; k < K; ++k) masses[k] = sums.sum1[k + 1].mass;
            Results::confidences(masses, weights);
        } else {
#pragma unroll
            for (int k = 0; k < K; ++k)
                weights[k] = weighting == Weighting::given ? results_.given_weight(row_, k) : 1.0f / float(K);
        }
    }

    // Coefficients of the gradient, and the gradient at the label: as in RowResults::compute_label_weights. `mass` is
    // the student's e^CE.
    CAMKD_DEVICE RowCoefficients<K> coefficients_of(const SharedSums<K>& sums, float mass, const float (&weights)[K],
                                                    float& at_label) const {
        const float soft = results_.soft_scale();
        const float hard = label_coefficient(group_.launch.args.formula, group_.grad_scale());
        RowCoefficients<K> coefficients;
        float total = 0, difference = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            coefficients.teacher[k] = weights[k] * soft * sums.sumT[k + 1].inverse;
            const float distance = sums.sumT[0].probability - sums.sumT[k + 1].probability;
            total += weights[k];
            difference = fmaf(weights[k], distance, difference);
        }
        coefficients.studentT = total * soft * sums.sumT[0].inverse;
        coefficients.student1 = hard * sums.sum1[0].inverse;
        at_label = fmaf(soft, difference, hard * ((1.0f - mass) * reciprocal(mass)));
        return coefficients;
    }

    // Each lane computes its row of row_stats, as in RowResults::write_label_row_stats, from its sum and e^CE.
    CAMKD_DEVICE void write_row_stats(const SharedSum& mine, float mass, const SharedSums<K>& sums,
                                      const SharedSum* shared, const float (&weights)[K]) {
        const RowLossArgs& args = group_.launch.args;
        const Formula& formula = args.formula;
        float weight = 0;
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (role_.stream() == k + 1) weight = weights[k];
        float number = std::log(role_.is_divergence() ? sums.sumT[0].sum / mine.sum : mass);
        if (role_.is_divergence()) number += shared[role_.sum() + kCross].sum * (1.0f / kLog2E) * mine.inverse;
        const float hard = shuffle(number, Role::lane_of(0, kSum1));
        const float term = product_or_zero<ScalarMath>(weight, number);
        float soft = 0;
#pragma unroll
        for (int k = 1; k <= K; ++k) soft += shuffle(term, Role::lane_of(k, kSumT));
        soft *= formula.temperature * formula.temperature;
        if (role_.which() == kCross) number = weight;
        if (role_.row() == row_stats::soft) number = soft;
        if (role_.row() == row_stats::loss)
            number = product_or_zero<ScalarMath>(formula.hard_weight, hard) +
                     product_or_zero<ScalarMath>(formula.soft_weight, soft);
        if (role_.writes()) args.row_stats[role_.row() * rows_.count() + row_] = number;
        batch_sum_ += number;
        if (args.batch.losses && role_.row() == row_stats::loss) args.batch.losses[row_] = number;
    }

    // A row that is ignored, has an invalid label or is out of range.
    CAMKD_DEVICE void run_general() {
        const RowLossArgs& args = group_.launch.args;
        const int r = two_rows() ? row_ % 2 : 0, fetched = rows_.column_of(rows_.label_of(row_ + rows_.step()));
        Info& info = group_.infos(0)[r];
        RowState& state = group_.rows()[r];
        if (group_.lane() <= K) {
            const char* const row = row_address(args.streams[group_.lane()], args.S, row_);
            info.logits.at[group_.lane()] = column_ >= 0 ? load_element(row, column_, Rows::kDtype) : NAN;
        }
        if (group_.lane() == 0) {
            info.row = row_;
            info.kept = column_ != kIgnored;
            info.label_valid = column_ >= 0;
            info.label_vector = column_ >= 0 ? column_ / V : -1;
            info.label_element = column_ >= 0 ? column_ % V : -1;
            info.second_vector = -1;
            state.out_of_range = true;
        }
        store_batch_sums();
        warp_barrier();
        if (info.kept) {
            statistics_.sum_up(info, r);
            results_.compute_weights(info, r);
        }
        results_.write_row_stats(info, r);
        if (args.grad_student) {
            if (info.kept)
                gradient_.general_grad(info, state, group_.chunk_of(info, r, 0), rows_.gradient_of(row_), info, {});
            else
                rows_.write_zeros(row_);
        }
        if (fetched != kIgnored) rows_.fetch(row_ + rows_.step(), buffer_);
        warp_barrier();
        if (role_.adds_up()) batch_sum_ = group_.batch_sums()[role_.row()];
        advance(fetched);
    }

    // To the next row. The row whose label has the column `fetched` is on its way into the buffers of this one.
    CAMKD_DEVICE void advance(int fetched) {
        copies_end_group();
        if (two_rows()) {
            column_ = next_column_;
            next_column_ = fetched;
            buffer_ = other_buffer();
            row_ += row_ % 2 ? rows_.step() - 1 : 1;
        } else {
            column_ = fetched;
            row_ += rows_.step();
        }
    }

    // The factors that depend on the number of labels, which the other blocks have counted meanwhile. All warps of the
    // block meet here once.
    CAMKD_DEVICE void make_ready() {
        if (group_.warp() == 0) minibatch_.write_scalars();
        block_barrier();
        ready_ = true;
    }

    CAMKD_DEVICE void store_batch_sums() const {
        if (role_.adds_up()) group_.batch_sums()[role_.row()] = batch_sum_;
    }

    // Whether the warp has two rows in flight, one with an even number and the one after it.
    CAMKD_DEVICE bool two_rows() const {
        static_assert(kRowsPerWarp == 2);
        return group_.rows_per_group() == 2;
    }
    CAMKD_DEVICE Pack* other_buffer() const {
        const int packs = group_.launch.geometry.slots * Rows::kSlotPacks;
        return buffer_ + (row_ % 2 ? -packs : packs);
    }
    // In the place of a RowState, which only the general passes need.
    CAMKD_DEVICE SharedSum* shared_sums() const {
        static_assert(sizeof(SharedSum) * Role::count <= offsetof(RowState, batch_sums));
        return reinterpret_cast<SharedSum*>(group_.rows());
    }

    const Group group_;
    const Rows rows_;
    const RowStatistics<T, true, FixedK> statistics_;
    const Results results_;
    const RowGradient<T, true, FixedK> gradient_;
    const RowMinibatch<T, true, FixedK> minibatch_;
    Role role_;
    int row_, column_;     // of the next row; `column_` is that of its label
    int next_column_;      // of the row after it, if two are in flight
    Pack* buffer_;         // of this lane, for the next row
    float batch_sum_ = 0;  // over this lane's row of row_stats
    bool ready_ = false;
};

template <class T, int FixedK>
CAMKD_KERNEL(kBlockThreads, blocks_per_multiprocessor(FixedK))
warp_rows_kernel(CAMKD_PARAMETER RowLaunch launch) {
    WarpRows<T, FixedK>(launch).run();
}

}  // namespace camkd::cuda
