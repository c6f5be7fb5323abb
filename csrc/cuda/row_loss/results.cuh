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
            const float ce = cross_entropy(info, sums);
            float top = -INFINITY;
            for (int k = 0; k < group_.teachers(); ++k) top = ScalarMath::max(shuffle(ce, k), top);
            weight = confidence(ScalarMath::exp(ScalarMath::difference(ce, top)));
        } else if (args.formula.weighting == Weighting::entropy && group_.teachers() > 1) {
            const float teachers = float(group_.teachers());
            const Totals entropy = totals_of(std::log(sum1) - sums.plogp / sum1);
            weight =
                ScalarMath::where_positive(entropy.all, entropy.others / entropy.all, (teachers - 1.0f) / teachers);
        } else if (args.formula.weighting == Weighting::given) {
            weight = group_.lane() < group_.teachers() ? given_weight(info.row, group_.lane()) : 0.0f;
        }
        // Coefficients of the gradient, multiplied by the corrections that the exponentials of their references lack
        const float total = sum_over_teachers(weight), scale = group_.grad_scale();
        const Reference reference(max, group_.temperature().scale);
        if (group_.lane() < group_.teachers()) {
            // Weight 0 drops even a teacher whose logits are NaN, and that of the soft loss all of them.
            const float coefficient = product_or_zero<ScalarMath>(weight, soft_scale() / sumT) * reference.factor();
            state.coefficients.teacher[group_.lane()] = args.formula.soft_weight == 0 ? 0.0f : coefficient;
            state.weights[group_.lane()] = weight;
        } else if (group_.lane() == group_.teachers()) {
            const float soft = args.formula.soft_weight == 0 ? 0.0f : soft_scale() * total / sumT;
            state.coefficients.studentT = (soft + label_nan(info)) * reference.factor();
            state.coefficients.student1 =
                label_coefficient(args.formula, scale) / sum1 * group_.temperature().factor1(reference, max);
        }
        if (group_.lane() <= group_.teachers()) state.references[stream()] = reference;
        warp_barrier();
        if (group_.has_two_labels(info)) write_second_gradient(info, r);
    }

    // Computes weights and coefficients on the fast path, without a logarithm or an exponential. Every lane computes
    // all of it: with the numbers spread over lanes, the row would wait for shuffles. Sets `out_of_range` if the row
    // needs the general passes; all blocks of a group have the same sums and decide alike.
    CAMKD_DEVICE void compute_label_weights(const Info& info, int r) const {
        if (group_.launch.debug) check_label(!info.kept || info.label_valid);
        if (!info.kept) return;
        constexpr int K = FixedK;
        const RowLossArgs& args = group_.launch.args;
        const Temperature& temperature = group_.temperature();
        RowState& state = group_.rows()[r];
        const LabelSums<K> sums = state.label_sums;
        const LabelLogits<K> logits = info.logits;
        // The label's own exponential is not 1 but 1 / factor; sum1 relative to it is e^CE, up to the rounding that
        // Temperature::mass is without
        float factors[K + 1], masses[K + 1], total_sums = 0, total_cross = 0;
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            factors[k] = logits.factors[k];
            masses[k] = sums.of[label_sum(k, kSum1)] * temperature.raise(factors[k]);
            total_sums += sums.of[label_sum(k, kSumT)] + sums.of[label_sum(k, kSum1)];
            if (k > 0) total_cross += fabsf(sums.of[label_sum(k, kCross)]);
        }
        if (group_.has_two_labels(info)) total_sums += mix_masses(info, logits, masses);
        // Weights
        float weights[K], total = 0;
        if (args.formula.weighting == Weighting::confidence && K > 1) {
            confidences(masses + 1, weights);
        } else {
#pragma unroll
            for (int k = 0; k < K; ++k)
                weights[k] = args.formula.weighting == Weighting::given ? given_weight(info.row, k) : 1.0f / float(K);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) total += weights[k];
        // Coefficients of the gradient, and the gradient at the label
        const float hard = label_coefficient(args.formula, group_.grad_scale()), soft = soft_scale();
        // Differences of probabilities: that of two products would round where student and teachers agree
        RowCoefficients<K> coefficients;
        const float inverse = reciprocal(sums.of[label_sum(0, kSumT)]);
        const float at_label = inverse * reciprocal(factors[0]);  // the student's probability of the label
        float difference = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float inverse_k = reciprocal(sums.of[label_sum(k + 1, kSumT)]);
            coefficients.teacher[k] = weights[k] * soft * inverse_k;
            difference = fmaf(weights[k], at_label - inverse_k * reciprocal(factors[k + 1]), difference);
        }
        coefficients.studentT = total * soft * inverse;
        coefficients.student1 = hard * reciprocal(sums.of[label_sum(0, kSum1)]);
        if (group_.lane() == 0) {
            state.coefficients = coefficients;
            const float mass =
                temperature.mass(info.logits.at[0], info.logits.factors[0], state.label_sums.of[label_sum(0, kSum1)]);
            state.label_gradient = fmaf(soft, difference, hard * ((1.0f - mass) * reciprocal(mass)));
            if (group_.has_two_labels(info)) write_label_gradients(info, r, sums, logits, weights);
#pragma unroll
            for (int k = 0; k < K; ++k) state.weights[k] = weights[k];
            state.out_of_range = !(in_range(total_sums, total_cross) && info.near);
        }
        warp_barrier();
    }

    // Computes the losses, which nothing waits for, and writes all rows of row_stats. Adds loss, hard and soft to those
    // of the group's other rows.
    CAMKD_DEVICE void write_row_stats(const Info& info, int r) const {
        if (info.row >= group_.launch.args.N) return;
        if constexpr (FixedK > 0) {
            if (info.kept && !group_.rows()[r].out_of_range) return write_label_row_stats(info, r);
        }
        write_general_row_stats(info, r);
    }

    // Whether the sums relative to the label can be used, from the sum of all of them and that of all |cross|. The
    // largest exponent is about the logarithm of the largest sum, and its rounding an error of the largest
    // exponentials. It shows in float32 first; 16-bit rows must only be far from overflow.
    static CAMKD_DEVICE bool in_range(float sums, float cross) {
        return sums < (sizeof(T) == 4 ? 1e12f : 1e30f) && cross < INFINITY;
    }

    // The confidence weights of all teachers from numbers proportional to e^CE, in one lane.
    template <int K>
    static CAMKD_DEVICE void confidences(const float* masses, float (&weights)[K]) {
        float total = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) total += masses[k];
        const float inverse = reciprocal(total * float(K - 1));
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float others = 0;
#pragma unroll
            for (int j = 0; j < K; ++j)
                if (j != k) others += masses[j];
            weights[k] = others * inverse;
        }
    }

    CAMKD_DEVICE float given_weight(int64_t row, int k) const {
        const RowLossArgs& args = group_.launch.args;
        return args.weights[k * args.weight_stride_k + row * args.weight_stride_n];
    }

    CAMKD_DEVICE float soft_scale() const {
        const Formula& formula = group_.launch.args.formula;
        return formula.soft_weight * formula.temperature * group_.grad_scale();
    }

  private:
    // On the fast path lane i computes and writes row i of row_stats.
    CAMKD_DEVICE void write_label_row_stats(const Info& info, int r) const {
        constexpr int K = FixedK;
        static_assert(row_stats::per_teacher + 3 * K <= kWarp, "a lane per row");
        const RowLossArgs& args = group_.launch.args;
        const Formula& formula = args.formula;
        const RowState& state = group_.rows()[r];
        const float* const sums = state.label_sums.of;
        const int lane = group_.lane(), row = lane - row_stats::per_teacher;
        const bool is_divergence = unsigned(row) < unsigned(K), is_weight = row >= 2 * K;
        const int k = row < K ? row : row < 2 * K ? row - K : row - 2 * K;  // lanes of the student have none
        const int stream = row < 0 || row >= 3 * K ? 0 : k + 1;
        const float sumT = sums[label_sum(stream, kSumT)], sum1 = sums[label_sum(stream, kSum1)];
        const float weight = stream > 0 ? state.weights[k] : 0.0f;
        // One logarithm of the ratio: the difference of two would cancel where student and teacher agree. Divided, so
        // that it is 0 where they are equal.
        const Temperature& temperature = group_.temperature();
        const float mass = is_divergence ? sums[label_sum(0, kSumT)] / sumT
                                         : temperature.mass(info.logits.at[stream], info.logits.factors[stream], sum1);
        float number = std::log(mass);
        if (group_.has_two_labels(info) && !is_divergence)
            number += group_.second(info).below(info.logits.at[stream], stream);
        if (is_divergence) number += sums[label_sum(stream, kCross)] * (1.0f / kLog2E) * reciprocal(sumT);
        const float hard = shuffle(number, row_stats::hard);
        const float term = product_or_zero<ScalarMath>(weight, number);
        float soft = 0;
#pragma unroll
        for (int i = 0; i < K; ++i) soft += shuffle(term, row_stats::divergence(i));
        soft *= formula.temperature * formula.temperature;
        if (is_weight) number = weight;
        if (lane == row_stats::soft) number = soft;
        if (lane == row_stats::loss)
            number = product_or_zero<ScalarMath>(formula.hard_weight, hard) +
                     product_or_zero<ScalarMath>(formula.soft_weight, soft);
        if (lane < row_stats::count(K)) args.row_stats[lane * args.N + info.row] = number;
        if (lane < row_stats::per_teacher) group_.batch_sums()[lane] += number;
        if (args.batch.losses && lane == row_stats::loss) args.batch.losses[info.row] = number;
    }

    CAMKD_DEVICE void write_general_row_stats(const Info& info, int r) const {
        const RowLossArgs& args = group_.launch.args;
        const Formula& formula = args.formula;
        const RowState& state = group_.rows()[r];
        const int K = group_.teachers(), k = group_.lane() < K ? group_.lane() : 0;
        float divergence = 0, hard = 0, soft = 0, loss = 0, ce = 0, weight = 0;
        if (info.kept) {
            const State& z = state.sums[k + 1];
            // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
            divergence = z.cross / (z.sumT * formula.temperature) + std::log(state.sums[0].sumT / z.sumT);
            ce = cross_entropy(info, state.sums[stream()]);
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

    // The gradient at the second label, as general_grad_vector computes it elsewhere; after all it depends on.
    CAMKD_DEVICE void write_second_gradient(const Info& info, int r) const {
        const SecondInfo<FixedK>& second = group_.second(info);
        const Temperature& temperature = group_.temperature();
        const RowState& state = group_.rows()[r];
        const float max = state.sums[stream()].max, logit = second.logits[1][stream()];
        float x[1] = {logit};
        state.references[stream()].apply(temperature.scale, max, x);
        const float e = exp2_fast(x[0]);
        // Weight 0 drops even a teacher whose logits are NaN.
        const float coefficient = group_.lane() < group_.teachers() ? state.coefficients.teacher[group_.lane()] : 0.0f;
        const float mixture = sum_over_teachers(product_or_zero<ScalarMath>(coefficient, e));
        float e1 = temperature.raise(e);
        if (temperature.power == 0) {
            x[0] = logit;
            Reference(max, kLog2E).apply(kLog2E, max, x);
            e1 = exp2_fast(x[0]);
        }
        const float onehot = label_coefficient(group_.launch.args.formula, group_.grad_scale()) * (1.0f - second.share);
        const float soft = fmaf(state.coefficients.studentT, e, -mixture);
        if (group_.lane() == group_.teachers())
            group_.second_states()[r].gradient = soft + (state.coefficients.student1 * e1 - onehot);
        warp_barrier();
    }

    // e^CE of the teachers of a row with two labels, from what it is at the reference. The labels are both together no
    // higher than the reference, so nothing cancels. Returns the sum.
    template <int K>
    CAMKD_DEVICE float mix_masses(const Info& info, const LabelLogits<K>& logits, float (&masses)[K + 1]) const {
        const SecondInfo<K>& second = group_.second(info);
        float sum = 0;
#pragma unroll
        for (int k = 1; k <= K; ++k) {
            masses[k] *= std::exp(second.below(logits.at[k], k));
            sum += masses[k];
        }
        return sum;
    }

    // The gradients at both labels, by one lane.
    template <int K>
    CAMKD_DEVICE void write_label_gradients(const Info& info, int r, const LabelSums<K>& sums,
                                            const LabelLogits<K>& logits, const float (&weights)[K]) const {
        const SecondInfo<K>& second = group_.second(info);
        group_.rows()[r].label_gradient = gradient_at(second.logits[0], second.share, sums, logits, weights);
        group_.second_states()[r].gradient = gradient_at(second.logits[1], 1.0f - second.share, sums, logits, weights);
    }

    // The gradient at one of two labels, by differences of probabilities as at the only one; `at` are the logits there.
    template <int K>
    CAMKD_DEVICE float gradient_at(const float* at, float share, const LabelSums<K>& sums, const LabelLogits<K>& logits,
                                   const float (&weights)[K]) const {
        const Temperature& temperature = group_.temperature();
        // As in the sums; at the reference itself without the error of the hardware's exponential
        const auto exponential = [&](int k) {
            const float reference = logits.at[k];
            if (at[k] == reference) return reciprocal(logits.factors[k]);
            return exp2_fast(fmaf(at[k], temperature.scale, -(reference * temperature.scale)));
        };
        const float e = exponential(0), p = e * reciprocal(sums.of[label_sum(0, kSumT)]);
        float difference = 0;
#pragma unroll
        for (int k = 0; k < K; ++k)
            difference =
                fmaf(weights[k], p - exponential(k + 1) * reciprocal(sums.of[label_sum(k + 1, kSumT)]), difference);
        const float hard = temperature.raise(e) * reciprocal(sums.of[label_sum(0, kSum1)]) - share;
        return fmaf(soft_scale(), difference,
                    label_coefficient(group_.launch.args.formula, group_.grad_scale()) * hard);
    }

    CAMKD_DEVICE int stream() const { return group_.lane() < group_.teachers() ? group_.lane() + 1 : 0; }

    // The cross-entropy of this lane's stream, whose sums these are.
    CAMKD_DEVICE float cross_entropy(const Info& info, const State& sums) const {
        if (group_.has_two_labels(info)) return std::log(sums.sum1) + group_.second(info).below(sums.max, stream());
        return std::log(sums.sum1) - (info.logits.at[stream()] - sums.max);
    }

    // NaN for invalid labels, else 0.
    static CAMKD_DEVICE float label_nan(const Info& info) { return info.label_valid ? 0.0f : NAN; }

    // Sums of one number per teacher, in their order: over all, and over the others than this lane's, because a
    // difference would cancel for a teacher that has nearly all of it.
    struct Totals {
        float all, others;
    };
    CAMKD_DEVICE Totals totals_of(float x) const {
        Totals totals{};
        for (int k = 0; k < group_.teachers(); ++k) {
            const float of_teacher = shuffle(x, k);
            totals.all += of_teacher;
            if (k != group_.lane()) totals.others += of_teacher;
        }
        return totals;
    }

    // The confidence weight of this lane's teacher from numbers proportional to e^CE.
    CAMKD_DEVICE float confidence(float mass) const {
        const Totals masses = totals_of(mass);
        return masses.others * (1.0f / (masses.all * float(group_.teachers() - 1)));
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
