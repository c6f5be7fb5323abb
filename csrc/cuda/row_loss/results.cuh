// From the statistics of a row to its weights, gradient coefficients and row_stats, by one warp: compute_weights and
// compute_losses of row_math.h with a lane per teacher, because the row waits for this step.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowResults {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    using Info = typename Group::Info;
    using RowState = typename Group::RowState;

  public:
    CAMKD_DEVICE RowResults(const Group& group) : group_(group) {}

    // The part that the gradient waits for: weights and coefficients. Lane k < K holds teacher k, the other lanes the
    // student.
    CAMKD_DEVICE void compute_weights(const Info& info, int r) const {
        if (group_.launch.debug) check_label(!info.kept || info.label_valid);
        if (!info.kept) return;
        const RowLossArgs& args = group_.launch.args;
        RowState& state = group_.rows()[r];
        const State& sums = state.sums[stream()];
        const float sumT = sums.sumT, sum1 = sums.sum1, max = sums.max;
        // Weights
        float weight = 1.0f / float(group_.teachers());
        if (args.formula.weighting == Weighting::confidence && group_.teachers() > 1) {
            const float ce = cross_entropy(sums, info.logits[stream()]);
            float top = -INFINITY;
            for (int k = 0; k < group_.teachers(); ++k) top = ScalarMath::max(shuffle(ce, k), top);
            weight = confidence(ScalarMath::exp(ScalarMath::difference(ce, top)));
        } else if (args.formula.weighting == Weighting::entropy && group_.teachers() > 1) {
            const float entropy = std::log(sum1) - sums.plogp / sum1, total = sum_over_teachers(entropy);
            weight = 1.0f - ScalarMath::where_positive(total, entropy / total, 1.0f / float(group_.teachers()));
        } else if (args.formula.weighting == Weighting::given) {
            weight = given_weight(info);
        }
        // Coefficients of the gradient, multiplied by the corrections that the exponentials of their references lack
        const float total = sum_over_teachers(weight), scale = group_.grad_scale();
        const Reference reference(max, group_.temperature().scale);
        if (group_.lane() < group_.teachers()) {
            // Weight 0 drops even a teacher whose logits are NaN.
            state.coefficients.teacher[group_.lane()] =
                product_or_zero<ScalarMath>(weight, soft_scale() / sumT) * reference.factor();
            state.weights[group_.lane()] = weight;
        } else if (group_.lane() == group_.teachers()) {
            state.coefficients.studentT = (soft_scale() * total / sumT + label_nan(info)) * reference.factor();
            state.coefficients.student1 =
                label_coefficient(args.formula, scale) / sum1 * group_.temperature().factor1(reference, max);
        }
        if (group_.lane() <= group_.teachers()) state.references[stream()] = reference;
        warp_barrier();
    }

    // The same on the fast path, without a logarithm or an exponential. Sets `out_of_range` if the row needs the
    // general passes; all blocks of a cluster have the same sums and decide alike.
    CAMKD_DEVICE void compute_label_weights(const Info& info, int r) const {
        if (group_.launch.debug) check_label(!info.kept || info.label_valid);
        if (!info.kept) return;
        // The largest exponent is about the logarithm of the largest sum, and its rounding an error of the largest
        // exponentials. It shows in float32 first; 16-bit rows must only be far from overflow.
        constexpr float most = sizeof(T) == 4 ? 1e12f : 1e30f;
        const RowLossArgs& args = group_.launch.args;
        RowState& state = group_.rows()[r];
        const float sumT = state.label_sums[label_sum(stream(), kSumT)];
        const float sum1 = state.label_sums[label_sum(stream(), kSum1)];
        const float cross = stream() > 0 ? state.label_sums[label_sum(stream(), kCross)] : 0.0f;
        const Reference reference(info.logits[stream()], group_.temperature().scale);
        // The label's own exponential is not 1 but 1 / factor; sum1 relative to it is e^CE
        const float factor = reference.factor(), factor1 = group_.temperature().raise(factor);
        const float exact_sum1 = sum1 * factor1;
        const bool fine = sumT < most && sum1 < most && fabsf(cross) < INFINITY && !reference.far();
        // Weights
        float weight = 1.0f / float(group_.teachers());
        if (args.formula.weighting == Weighting::confidence && group_.teachers() > 1)
            weight = confidence(exact_sum1);
        else if (args.formula.weighting == Weighting::given)
            weight = given_weight(info);
        // Coefficients of the gradient, and the gradient at the label
        const float hard = label_coefficient(args.formula, group_.grad_scale());
        const float total = sum_over_teachers(weight);
        const float coefficient = (stream() > 0 ? weight : total) * soft_scale() / sumT;
        const float soft_at_label = coefficient / factor, mixture_at_label = sum_over_teachers(soft_at_label);
        if (group_.lane() < group_.teachers()) {
            state.coefficients.teacher[group_.lane()] = coefficient;
            state.weights[group_.lane()] = weight;
        } else if (group_.lane() == group_.teachers()) {
            state.coefficients.studentT = coefficient;
            state.coefficients.student1 = hard / sum1;
            state.label_gradient = (soft_at_label - mixture_at_label) + (hard / exact_sum1 - hard);
        }
        if (group_.lane() <= group_.teachers()) {
            State& sums = state.sums[stream()];
            sums.max = info.logits[stream()];
            sums.sumT = sumT;
            sums.sum1 = exact_sum1;
            sums.cross = cross * group_.temperature().inverse;
        }
        const bool any_out = warp_any(!fine);
        if (group_.lane() == 0) state.out_of_range = any_out;
        warp_barrier();
    }

    // Computes the losses, which nothing waits for, and writes all rows of row_stats. Adds loss, hard and
    // soft to those of the group's other rows.
    CAMKD_DEVICE void write_row_stats(const Info& info, int r) const {
        const RowLossArgs& args = group_.launch.args;
        const Formula& formula = args.formula;
        if (info.row >= args.N) return;
        const RowState& state = group_.rows()[r];
        const int K = group_.teachers(), k = group_.lane() < K ? group_.lane() : 0;
        float divergence = 0, hard = 0, soft = 0, loss = 0, ce = 0, weight = 0;
        if (info.kept) {
            const State& z = state.sums[k + 1];
            // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
            divergence = z.cross / (z.sumT * formula.temperature) + std::log(state.sums[0].sumT / z.sumT);
            ce = cross_entropy(state.sums[stream()], info.logits[stream()]);
            hard = shuffle(ce, K);
            weight = state.weights[k];
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
    CAMKD_DEVICE int stream() const { return group_.lane() < group_.teachers() ? group_.lane() + 1 : 0; }

    static CAMKD_DEVICE float cross_entropy(const State& sums, float label) {
        return std::log(sums.sum1) - (label - sums.max);
    }

    // NaN for a label outside [0, C), else 0.
    static CAMKD_DEVICE float label_nan(const Info& info) { return info.label_valid ? 0.0f : NAN; }

    CAMKD_DEVICE float soft_scale() const {
        const Formula& formula = group_.launch.args.formula;
        return formula.soft_weight * formula.temperature * group_.grad_scale();
    }

    // The confidence weight of this lane's teacher from numbers proportional to e^CE: the share of the others, because
    // 1 - share would cancel for a teacher that is by far the worst.
    CAMKD_DEVICE float confidence(float mass) const {
        float total = 0, others = 0;
        for (int k = 0; k < group_.teachers(); ++k) {
            const float mass_k = shuffle(mass, k);
            total += mass_k;
            if (k != group_.lane()) others += mass_k;
        }
        return others * (1.0f / (total * float(group_.teachers() - 1)));
    }

    CAMKD_DEVICE float given_weight(const Info& info) const {
        const RowLossArgs& args = group_.launch.args;
        return group_.lane() < group_.teachers()
                   ? args.weights[group_.lane() * args.weight_stride_k + info.row * args.weight_stride_n]
                   : 0.0f;
    }

    // The sum of one number per teacher, in their order.
    CAMKD_DEVICE float sum_over_teachers(float x) const {
        float sum = 0;
        for (int k = 0; k < group_.teachers(); ++k) sum += shuffle(x, k);
        return sum;
    }

    const Group group_;
};

}  // namespace camkd::cuda
