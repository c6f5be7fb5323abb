// Runs every kernel once in every regime, for ThreadSanitizer. Exits with 1 if a result is not finite. With
// CAMKD_DELAYS every kernel runs once more with delays (host_threads.h), which must not change a bit.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/row_loss/group.cuh"

namespace camkd::cuda {

// The 16-bit instantiations of the row kernel have the same barriers, and compile as long.
template <class T>
void launch_row_loss(RowLaunch&, const LaunchOptions&, const RowTrial&);
template <>
void launch_row_loss<bf16>(RowLaunch&, const LaunchOptions&, const RowTrial&) {
    std::abort();
}
template <>
void launch_row_loss<f16>(RowLaunch&, const LaunchOptions&, const RowTrial&) {
    std::abort();
}

}  // namespace camkd::cuda

using namespace camkd;
using namespace camkd::cuda;

namespace {

std::vector<float> numbers(size_t count, float scale) {
    std::vector<float> x(count);
    uint32_t state = 12345;
    for (float& value : x) {
        state = state * 1664525u + 1013904223u;
        value = scale * (float(state >> 8) / float(1 << 24) - 0.5f);
    }
    return x;
}

bool all_finite(const char* what, const std::vector<float>& x) {
    for (float value : x)
        if (!std::isfinite(value)) {
            std::printf("%s: %g\n", what, value);
            return false;
        }
    return true;
}

// Runs `launch`, which writes to these outputs, without delays and, if they are wanted, with them.
template <class Launch>
bool same_with_delays(const char* what, std::initializer_list<std::vector<float>*> outputs, Launch launch) {
    launch();
    if (!host::delays.seed) return true;
    std::vector<std::vector<float>> before;
    for (std::vector<float>* output : outputs) {
        before.push_back(*output);
        std::fill(output->begin(), output->end(), NAN);
    }
    host::delays.on = true;
    launch();
    host::delays.on = false;
    size_t i = 0;
    for (const std::vector<float>* output : outputs) {
        const std::vector<float>& expected = before[i++];
        if (std::memcmp(output->data(), expected.data(), expected.size() * sizeof(float)) == 0) continue;
        std::printf("%s: output %zu changes with delays\n", what, i - 1);
        return false;
    }
    return true;
}

// Rows of random logits, all of them with one label or with two, and what row_loss writes about them.
struct Rows {
    RowLossArgs args{};
    std::vector<std::vector<float>> streams;
    std::vector<int64_t> target, second;
    std::vector<float> mix, out, grad, loss = {NAN}, means = {NAN, NAN, NAN}, others;

    // With `far`, labels of every other row are far below the maximum.
    Rows(int64_t N, int C, int K, bool far, bool two)
        : target(static_cast<size_t>(N), C / 2),
          second(size_t(N), C / 3),
          mix(size_t(N), 0.25f),
          out(size_t((4 + 3 * K) * N), NAN),
          grad(size_t(N * C), NAN),
          others(size_t(batch_floats(N, host::limits)), NAN) {
        args.N = args.S = N;
        args.C = C;
        args.K = K;
        for (int k = 0; k <= K; ++k) {
            streams.push_back(numbers(size_t(N * C), float(k + 3)));
            for (int64_t n = 1; far && n < N; n += 2) streams.back()[size_t(n * C + C / 2)] = -300;
            args.streams[k] = {streams[k].data(), N * C, C, DType::f32};
        }
        target[0] = -100;
        args.target = target.data();
        if (two) args.second = {second.data(), mix.data()};
        args.row_stats = out.data();
        args.grad_student = grad.data();
        args.grad_scale = 1;
        args.batch = {nullptr, loss.data(), others.data(), true, 1};
    }

    // With blocks one after the other, and all at once.
    bool run(const char* what, const Formula& formula) {
        args.formula = formula;
        out.resize(size_t(row_stats::count(args.K, formula.entropy) * args.N));
        bool fine = true;
        for (bool together : {false, true}) {
            host::together = together;
            fine = same_with_delays(what, {&out, &grad, &loss, &means},
                                    [&] {
                                        row_loss(args, {});
                                        std::copy_n(others.begin(), means.size(), means.begin());
                                    }) &&
                   fine;
        }
        host::together = false;
        return fine && all_finite(what, out) && all_finite(what, grad) && all_finite(what, loss) &&
               all_finite(what, means);
    }
};

Formula papers_formula(Weighting weighting) {
    Formula formula{};
    formula.temperature = 4;
    formula.hard_weight = formula.soft_weight = 1;
    formula.weighting = weighting;
    formula.ignore_index = -100;
    formula.scale_by_t2 = true;
    return formula;
}

// Runs row_loss, after checking that the launch table picks the regime: `blocks` of them per row, or `chunks` of it.
// The limits decide between clusters, cooperative groups and the pipelined kernel. With `far`, the fixed-K kernels sum
// up every other row twice. With `two`, rows have two labels. `trial`: rows in flight and gradients at once of the
// pipelined kernel.
bool run_rows(const char* what, int64_t N, int C, int K, Limits limits, int blocks, bool chunks,
              Weighting weighting = Weighting::confidence, bool far = false, bool two = false, RowTrial trial = {}) {
    host::limits = limits;
    const int fixed_k = weighting == Weighting::entropy ? 0 : K;
    RowProblem problem{};
    problem.N = N, problem.C = C, problem.K = K, problem.fixed_k = fixed_k;
    problem.vector = 4, problem.vectors = (C + 3) / 4;
    problem.needs_mean = true;
    RowShared::measure(problem, two);
    try_geometry(trial);
    const RowGeometry g = row_geometry(problem, limits, trial);
    if ((g.warp_per_row ? 1 : g.blocks_per_group) != blocks || (g.chunks > 1) != chunks ||
        g.pipelined != (limits.pipeline_warps > 0)) {
        std::printf("%s: %d blocks to a row, %d chunks\n", what, g.blocks_per_group, g.chunks);
        return false;
    }
    return Rows(N, C, K, far, two).run(what, papers_formula(weighting));
}

// The kernel of other formulas, with more rows than groups.
bool run_formula(const char* what, int64_t N, int C, int K, Divergence divergence) {
    host::limits = {2, 96 * 1024, 300 * 1024, 1 << 20, 1, 64, 0, 0};
    Formula formula = papers_formula(Weighting::entropy);
    formula.divergence = divergence;
    formula.mixture_share = formula.mixture_other = 0.5;
    formula.z_loss_weight = 0.1f;
    formula.entropy = true;
    return Rows(N, C, K, false, true).run(what, formula);
}

bool run_others(int64_t N, int C, int K) {
    // One multiprocessor, so that blocks loop over the rows.
    host::limits = {1, 96 * 1024, 300 * 1024, 1 << 20, 1, 64, 0, 0};
    const std::vector<float> x = numbers(size_t(N * C), 3), y = numbers(size_t(N * C), 5);
    std::vector<float> grads(size_t(K * N * C), NAN), weights(size_t(K * N), NAN),
        ce = weights, lse = weights, error = weights, scaled(size_t(N * C), NAN);
    const std::vector<int64_t> target(static_cast<size_t>(N), C / 2);
    ConfidenceArgs confidence{};
    FeatureArgs features{};
    confidence.N = confidence.S = features.N = N;
    confidence.C = C;
    confidence.K = features.K = K;
    for (int k = 0; k < K; ++k) {
        confidence.logits[k] = {k % 2 ? x.data() : y.data(), N * C, C, DType::f32};
        // The second teacher's samples are C / 10 columns of 10, which a warp transposes
        features.P[k] = k % 2 ? 10 : 1;
        features.Q[k] = C / features.P[k];
        features.student[k] = {k % 2 ? x.data() : y.data(), C, features.Q[k], 1, DType::f32};
        features.teacher[k] = {x.data(), C, 1, features.P[k], DType::f32};
        confidence.grads[k] = features.grads[k] = grads.data() + k * N * C;
    }
    confidence.target = target.data();
    confidence.ignore_index = -100;
    confidence.weights = weights.data();
    confidence.ce = ce.data();
    confidence.lse = lse.data();
    std::vector<float> inverse(1, NAN);
    confidence.inverse_valid = inverse.data();
    bool fine =
        same_with_delays("confidence", {&weights, &ce, &lse, &inverse}, [&] { confidence_forward(confidence, {}); });
    confidence.grad_ce = weights.data();
    fine = same_with_delays("confidence, gradient", {&grads}, [&] { confidence_backward(confidence, {}); }) && fine &&
           all_finite("confidence", grads);
    error.resize(size_t(K * N + kFeatureParts), NAN);
    std::vector<float> loss(1, NAN);
    features.error = error.data();
    features.loss = loss.data();
    features.weights = weights.data();
    features.weight_stride_k = N;
    features.weight_stride_n = 1;
    features.scale = features.grad_scale = 1;
    enum class Grid { one_after_the_other, together, launches_of_their_own };
    for (Grid grid : {Grid::one_after_the_other, Grid::together, Grid::launches_of_their_own}) {
        host::together = grid == Grid::together;
        host::separate = grid == Grid::launches_of_their_own;
        fine = same_with_delays("features", {&grads, &error, &loss}, [&] { camkd::cuda::features(features, {}); }) &&
               fine && all_finite("feature loss", loss);
    }
    host::together = host::separate = false;
    fine =
        same_with_delays("scale_rows", {&scaled},
                         [&] { scale_rows({N, C, grads.data(), scaled.data(), DType::f32, error.data(), 1}, {}); }) &&
        fine;
    return fine && all_finite("features", grads) && all_finite("scale_rows", scaled);
}

}  // namespace

int main() {
    const int threads = 64;
    // (multiprocessors, shared memory of a block and of a multiprocessor, L2, cluster, threads, least blocks of a
    // cooperative group, warps of a pipelined block)
    const Weighting confidence = Weighting::confidence;
    const bool fine =
        run_rows("warps", 9, 37, 2, {2, 96 * 1024, 300 * 1024, 1 << 20, 4, threads, 0, 0}, 1, false) &
        run_rows("even", 9, 40, 2, {2, 96 * 1024, 300 * 1024, 1 << 20, 4, threads, 0, 0}, 1, false) &
        run_rows("pairs", 29, 40, 2, {1, 96 * 1024, 300 * 1024, 1 << 20, 1, threads, 0, 0}, 1, false) &
        run_rows("pairs, far labels", 29, 40, 2, {1, 96 * 1024, 300 * 1024, 1 << 20, 1, threads, 0, 0}, 1, false,
                 confidence, true) &
        run_rows("block", 5, 1301, 2, {2, 96 * 1024, 300 * 1024, 1 << 20, 1, threads, 0, 0}, 1, false) &
        run_rows("cluster", 9, 1021, 2, {2, 6 * 1024, 30 * 1024, 1 << 20, 4, threads, 0, 0}, 4, false) &
        run_rows("chunks", 5, 701, 2, {2, 6 * 1024, 30 * 1024, 1 << 20, 1, threads, 0, 0}, 1, true) &
        run_rows("warps, far labels", 9, 37, 2, {2, 96 * 1024, 300 * 1024, 1 << 20, 4, threads, 0, 0}, 1, false,
                 confidence, true) &
        run_rows("cluster, far labels", 9, 1021, 2, {2, 6 * 1024, 30 * 1024, 1 << 20, 4, threads, 0, 0}, 4, false,
                 confidence, true) &
        run_rows("chunks, far labels", 5, 701, 2, {2, 6 * 1024, 30 * 1024, 1 << 20, 1, threads, 0, 0}, 1, true,
                 confidence, true) &
        run_rows("cooperative", 9, 701, 2, {4, 6 * 1024, 30 * 1024, 1 << 20, 1, threads, 2, 0}, 3, false) &
        run_rows("cooperative, far labels", 9, 701, 2, {6, 6 * 1024, 30 * 1024, 1 << 20, 1, threads, 2, 0}, 3, false,
                 confidence, true) &
        run_rows("pipelined", 19, 500, 2, {2, 12 * 1024, 5 * 1024, 1 << 20, 1, threads, 2, 2}, 2, false) &
        run_rows("pipelined, far labels", 7, 500, 2, {2, 12 * 1024, 5 * 1024, 1 << 20, 1, threads, 2, 2}, 2, false,
                 confidence, true) &
        run_rows("pipelined, three rows", 19, 500, 2, {2, 16 * 1024, 5 * 1024, 1 << 20, 1, threads, 2, 2}, 2, false,
                 confidence, true, false, {0, 0, 3, 1}) &
        run_rows("pipelined, two gradients", 18, 500, 2, {2, 12 * 1024, 5 * 1024, 1 << 20, 1, threads, 2, 2}, 2, false,
                 confidence, false, false, {0, 0, 2, 2}) &
        run_rows("pipelined, four rows, two gradients", 19, 500, 2, {2, 20 * 1024, 5 * 1024, 1 << 20, 1, threads, 2, 2},
                 2, false, confidence, true, false, {0, 0, 4, 2}) &
        run_rows("pipelined, two labels", 7, 500, 2, {2, 12 * 1024, 5 * 1024, 1 << 20, 1, threads, 2, 2}, 2, false,
                 confidence, true, true) &
        run_rows("warps, two labels", 9, 37, 2, {2, 96 * 1024, 300 * 1024, 1 << 20, 4, threads, 0, 0}, 1, false,
                 confidence, false, true) &
        run_rows("cluster, two labels", 9, 1021, 2, {2, 6 * 1024, 30 * 1024, 1 << 20, 4, threads, 0, 0}, 4, false,
                 confidence, true, true) &
        run_rows("general, warps", 9, 37, 2, {2, 96 * 1024, 300 * 1024, 1 << 20, 1, threads, 0, 0}, 1, false,
                 Weighting::entropy) &
        run_rows("general, cluster", 9, 1021, 2, {2, 7 * 1024, 30 * 1024, 1 << 20, 4, threads, 0, 0}, 4, false,
                 Weighting::entropy) &
        run_rows("general, chunks", 5, 701, 2, {2, 7 * 1024, 30 * 1024, 1 << 20, 1, threads, 0, 0}, 1, true,
                 Weighting::entropy) &
        run_rows("general, cooperative", 9, 701, 2, {6, 7 * 1024, 30 * 1024, 1 << 20, 1, threads, 2, 0}, 3, false,
                 Weighting::entropy) &
        run_formula("reverse KL, warps", 9, 37, 2, Divergence::reverse_kl) &
        run_formula("reverse KL, blocks", 5, 1101, 2, Divergence::reverse_kl) &
        run_formula("JSD, warps", 9, 37, 2, Divergence::jsd) & run_formula("JSD, blocks", 5, 1101, 2, Divergence::jsd) &
        run_others(5, 70, 2) & run_others(9, 1100, 2);
    return fine ? 0 : 1;
}
