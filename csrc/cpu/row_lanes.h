// From the sums of a row to its row_stats and gradient coefficients, by compute_weights and compute_losses of
// row_math.h, for as many rows at once as a vector has lanes.
#pragma once

#include <algorithm>

#include "row_functions.h"

namespace camkd::cpu {
namespace {

// The sums and coefficients of up to Vec::width consecutive rows, one row per lane. Lanes of ignored rows hold harmless
// numbers, and their row_stats become 0.
class LaneRows {
  public:
    static constexpr int W = Vec::width;
    using Stream = RowSums<float[W]>;
    alignas(64) Stream streams[kMaxStreams];
    float label_nan[W];
    int32_t kept[W];
    float studentT[W], student1[W], teacher[kMaxTeachers][W], center[kMaxTeachers][W];  // GradCoefficients

    void reset(int K) {
        std::fill_n(kept, W, 0);
        std::fill_n(label_nan, W, 0.0f);
        for (int k = 0; k <= K; ++k) {
            Stream& stream = streams[k];
            for (float* zeros : {stream.max, stream.cross, stream.plogp, stream.label, stream.center})
                std::fill_n(zeros, W, 0.0f);
            for (float* ones : {stream.sumT, stream.sum1}) std::fill_n(ones, W, 1.0f);
        }
    }

    // The sums of row n, of which the columns here are a shard, in place of those over these columns.
    void read_sums(const RowLossArgs& args, int64_t n, int lane) {
        for (int k = 0; k <= args.K; ++k)
            for (int i = 0; i < kRowSums; ++i) numbers(k, i)[lane] = sum_of(args, k, i, n);
        label_nan[lane] = std::isnan(streams[0].label[lane]) ? NAN : 0.0f;
    }

    // Writes what the call is for, of rows begin .. begin + count - 1.
    void write(const RowLossArgs& args, int64_t begin, int count) {
        if (args.shard != Shard::none && writes_sums(args)) return write_sums(args, begin, count);
        write_row_stats(args, begin, count);
    }

  private:
    __attribute__((noinline)) void write_sums(const RowLossArgs& args, int64_t begin, int count) {
        for (int k = 0; k <= args.K; ++k)
            for (int i = 0; i < kRowSums; ++i) std::copy_n(numbers(k, i), count, &sum_of(args, k, i, begin));
    }

    float* numbers(int k, int i) { return reinterpret_cast<float*>(streams + k) + i * W; }

    // Writes row_stats of rows begin .. begin + count - 1 and keeps their gradient coefficients.
    void write_row_stats(const RowLossArgs& args, int64_t begin, int count) {
        const int K = args.K;
        RowSums<Vec> sums[kMaxStreams];
        RowResult<Vec> result;
        GradCoefficients<Vec> coefficients;
        for (int k = 0; k <= K; ++k) {
            const Stream& s = streams[k];
            sums[k].max = Vec::load(s.max);
            sums[k].sumT = Vec::load(s.sumT);
            sums[k].sum1 = Vec::load(s.sum1);
            sums[k].cross = Vec::load(s.cross);
            sums[k].plogp = Vec::load(s.plogp);
            sums[k].label = Vec::load(s.label);
            sums[k].center = Vec::load(s.center);
        }
        if (args.formula.weighting == Weighting::given) {
            for (int k = 0; k < K; ++k) {
                float given[W] = {};
                for (int lane = 0; lane < count; ++lane)
                    given[lane] = args.weights[k * args.weight_stride_k + (begin + lane) * args.weight_stride_n];
                result.weights[k] = Vec::load(given);
            }
        }
        const Vec label_nans = Vec::load(label_nan);
        compute_weights<LaneMath>(args.formula, K, sums[0], sums + 1, label_nans, args.grad_scale, result,
                                  coefficients);
        compute_losses<LaneMath>(args.formula, K, sums[0], sums + 1, label_nans, result);
        const Vec mask = Vec::load(reinterpret_cast<const float*>(kept));
        auto store_row = [&](int row, Vec x) {
            store_lanes(args.row_stats + row * args.N + begin, Vec::bit_and(x, mask), count);
        };
        store_row(row_stats::loss, result.loss);
        store_row(row_stats::hard, result.hard);
        store_row(row_stats::soft, result.soft);
        for (int k = 0; k < K; ++k) {
            store_row(row_stats::divergence(k), result.divergence[k]);
            store_row(row_stats::teacher_ce(K, k), result.teacher_ce[k]);
            store_row(row_stats::weight(K, k), result.weights[k]);
            coefficients.teacher[k].store(teacher[k]);
        }
        if (args.formula.entropy) store_row(row_stats::entropy(K), result.entropy);
        coefficients.studentT.store(studentT);
        coefficients.student1.store(student1);
        if (args.formula.divergence == Divergence::forward_kl) return;
        for (int k = 0; k < K; ++k) coefficients.center[k].store(center[k]);
    }
};

}  // namespace
}  // namespace camkd::cpu
