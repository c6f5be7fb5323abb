// From the statistics of a row to its weights, gradient coefficients and row_stats, by one warp: compute_weights and
// compute_losses of row_math.h with a lane per teacher, because the row waits for this step.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowResults {
    using Group = RowGroup<T, WarpPerRow, FixedK>;

  public:
    CAMKD_DEVICE RowResults(const Group& group) : group_(group) {}

    // The part that the gradient waits for: cross-entropies, weights and coefficients. Lane k < K holds teacher k, the
    // other lanes the student.
    CAMKD_DEVICE void compute_weights(const RowInfo& info, int r) const {
        const RowLossArgs& args = group_.launch.args;
        if (group_.launch.debug) check_label(!info.kept || info.label_valid);
        if (!info.kept) return;
        RowState& state = group_.rows()[r];
        // Cross-entropies
        const int K = group_.teachers(), stream = group_.lane() < K ? group_.lane() + 1 : 0;
        const RowSums<float>& sums = state.sums[stream];
        const float sumT = sums.sumT, sum1 = sums.sum1, max = sums.max, log_sum1 = std::log(sum1);
        const float label = info.label_valid ? *group_.label_at(r, stream) : NAN, ce = log_sum1 - (label - max);
        // Weights
        float weight = 1.0f / float(K);
        if (args.formula.weighting == Weighting::given) {
            if (group_.lane() < K)
                weight = args.weights[group_.lane() * args.weight_stride_k + info.row * args.weight_stride_n];
        } else if (args.formula.weighting == Weighting::confidence && K > 1) {
            float top = -INFINITY, total = 0, others = 0;
            for (int k = 0; k < K; ++k) top = ScalarMath::max(shuffle(ce, k), top);
            const float mass = ScalarMath::exp(ScalarMath::difference(ce, top));
            for (int k = 0; k < K; ++k) {
                const float mass_k = shuffle(mass, k);
                total += mass_k;
                if (k != group_.lane()) others += mass_k;
            }
            weight = others * (1.0f / (total * float(K - 1)));
        } else if (args.formula.weighting == Weighting::entropy && K > 1) {
            const float entropy = log_sum1 - sums.plogp / sum1, total = sum_over_teachers(entropy);
            weight = 1.0f - ScalarMath::where_positive(total, entropy / total, 1.0f / float(K));
        }
        // Coefficients of the gradient, multiplied by the corrections that the exponentials of their references lack
        const float total = sum_over_teachers(weight), scale = group_.grad_scale();
        const float soft_scale = args.formula.soft_weight * args.formula.temperature * scale;
        const Reference reference(max, group_.temperature().scale);
        bool fast = !reference.far();
        if (group_.lane() < K) {
            const float coefficient = product_or_zero<ScalarMath>(weight, soft_scale / sumT);
            // Weight 0 drops even a teacher whose logits are NaN.
            fast = fast && (coefficient != 0 || sumT < INFINITY);
            state.coefficients.teacher[group_.lane()] = coefficient * reference.factor();
            state.result.teacher_ce[group_.lane()] = ce;
            state.result.weights[group_.lane()] = weight;
        } else if (group_.lane() == K) {
            state.coefficients.studentT = (soft_scale * total / sumT + label_nan(info)) * reference.factor();
            state.coefficients.student1 =
                label_coefficient(args.formula, scale) / sum1 * group_.temperature().factor1(reference, max);
            state.result.hard = ce;
        }
        if (group_.lane() <= K) state.references[stream] = reference;
        const bool all_fast = !warp_any(!fast);
        if (group_.lane() == 0) state.fast_path = all_fast;
        warp_barrier();
    }

    // Computes the losses, which nothing waits for, and writes all rows of row_stats. Adds loss, hard and
    // soft to those of the group's other rows.
    CAMKD_DEVICE void write_row_stats(const RowInfo& info, int r) const {
        const RowLossArgs& args = group_.launch.args;
        const Formula& formula = args.formula;
        if (info.row >= args.N) return;
        const RowState& state = group_.rows()[r];
        const int K = group_.teachers(), k = group_.lane() < K ? group_.lane() : 0;
        float divergence = 0, hard = 0, soft = 0, loss = 0, ce = 0, weight = 0;
        if (info.kept) {
            const RowSums<float>& z = state.sums[k + 1];
            // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
            divergence = z.cross / (z.sumT * formula.temperature) + std::log(state.sums[0].sumT / z.sumT);
            ce = state.result.teacher_ce[k];
            weight = state.result.weights[k];
            hard = state.result.hard;
            soft = formula.temperature * formula.temperature *
                   sum_over_teachers(product_or_zero<ScalarMath>(weight, divergence));
            // A label outside [0, C) makes the whole row NaN, whatever the weights are.
            loss = product_or_zero<ScalarMath>(formula.hard_weight, hard) +
                   product_or_zero<ScalarMath>(formula.soft_weight, soft) + label_nan(info);
        }
        float* const stats = args.row_stats + info.row;
        // Lanes 0, 1 and 2 write one row each.
        static_assert(row_stats::loss == 0 && row_stats::hard == 1 && row_stats::soft == 2);
        const float number = group_.lane() == row_stats::loss ? loss : group_.lane() == row_stats::hard ? hard : soft;
        if (group_.lane() <= row_stats::soft) {
            stats[group_.lane() * args.N] = number;
            group_.batch_sums()[group_.lane()] += number;
        }
        if (args.batch.losses && group_.lane() == row_stats::loss) args.batch.losses[info.row] = loss;
        if (group_.lane() < K) {
            stats[row_stats::divergence(k) * args.N] = divergence;
            stats[row_stats::teacher_ce(K, k) * args.N] = ce;
            stats[row_stats::weight(K, k) * args.N] = weight;
        }
    }

  private:
    // NaN for a label outside [0, C), else 0.
    static CAMKD_DEVICE float label_nan(const RowInfo& info) { return info.label_valid ? 0.0f : NAN; }

    // The sum of one number per teacher, in their order.
    CAMKD_DEVICE float sum_over_teachers(float x) const {
        float sum = 0;
        for (int k = 0; k < group_.teachers(); ++k) sum += shuffle(x, k);
        return sum;
    }

    const Group group_;
};

}  // namespace camkd::cuda
