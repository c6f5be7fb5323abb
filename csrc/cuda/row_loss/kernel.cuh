// The logit loss, one kernel for every width: a team of threads (a warp, a block, a cluster of blocks) keeps the K + 1
// rows in shared memory from their only read on, merges its sums, and writes numbers and residual. While the residual
// of a row is written, the next row is fetched into the slots that become free. Rows too wide for that pass through the
// same slots in batches, forwards for the sums and backwards for the residual.
#pragma once

#include "../batch_mean.cuh"
#include "statistics.cuh"

namespace camkd::cuda {

template <class T, bool WarpTeams, int Teachers>
class RowKernel {
    using Team = RowTeam<T, WarpTeams, Teachers>;
    static constexpr int V = kVector<T>;
    static constexpr int Known = Team::Known;

  public:
    CAMKD_DEVICE RowKernel(const RowLaunch& launch)
        : team_{launch, WarpTeams ? 0 : cluster_rank()}, statistics_(team_) {}

    CAMKD_DEVICE void run() {
        if (team_.prepares()) {
            const int team =
                WarpTeams ? int(block_id()) * team_.warps() + team_.warp() : int(block_id()) / team_.cluster();
            const int64_t first = int64_t(team) * team_.together();
            ahead_ = label_of(first + team_.lane());
            prepare(first, 0);
        }
        if (team_.warp() == 0) prepare_batch();
        if (team_.cluster() > 1) {
            if (thread_id() < 2) mailbox_open(team_.box(thread_id()));
            cluster_barrier(true);
        }
        block_barrier();
        fetch_first_batches(0);
        for (int turn = 0; team_.infos(turn & 1)[0].row < team_.launch.args.N; ++turn) {
            const int parity = turn & 1;
            const RowInfo* const infos = team_.infos(parity);
#pragma unroll 1
            for (int r = 0; r < team_.together(); ++r)
                if (infos[r].kept) statistics_.sum_up(infos[r], r);
            team_.barrier();
            if (team_.prepares()) prepare(infos[0].row + int64_t(team_.launch.teams) * team_.together(), parity ^ 1);
            if (!WarpTeams && team_.merges() && infos[0].kept) {
                statistics_.merge_warps();
                if (team_.cluster() > 1) statistics_.merge_blocks(infos[0]);
                warp_barrier();
            }
            if (team_.merges()) {
#pragma unroll 1
                for (int r = 0; r < team_.together(); ++r) {
                    compute_weights(infos[r], r);
                    if (WarpTeams) write_row_stats(infos[r], r);
                }
            }
            team_.barrier();
            // Not by the warp that the next row waits for most, and by one block after the other.
            if (!WarpTeams && team_.prepares() && (turn & (team_.cluster() - 1)) == team_.rank)
                write_row_stats(infos[0], 0);
            for (int b = team_.launch.args.grad_student ? team_.batches() - 1 : 0; b >= 0; --b) {
#pragma unroll 1
                for (int r = 0; r < team_.together(); ++r) write_grad(infos[r], r, b, parity);
            }
        }
        if (team_.launch.alone) add_up();
    }

  private:
    CAMKD_DEVICE void fetch_first_batches(int parity) const {
        for (int r = 0; r < team_.together(); ++r) {
            const RowInfo& info = team_.infos(parity)[r];
            if (info.kept) team_.fetch_batch(info, team_.batch_of(info, r, 0));
        }
    }

    CAMKD_DEVICE int64_t label_of(int64_t row) const {
        const RowLossArgs& args = team_.launch.args;
        return row < args.N ? args.target[row] : args.formula.ignore_index;
    }

    // Finds the team's next rows from `first` on, a row or a stream to each lane; an ignored row, or one beyond the
    // last, is not looked at. Asks for the labels of those after them, which take a while to come.
    CAMKD_DEVICE void prepare(int64_t first, int parity) {
        const RowLossArgs& args = team_.launch.args;
        const int rows = team_.together();
        RowInfo* const infos = team_.infos(parity);
        if (team_.lane() < rows) {
            RowInfo& info = infos[team_.lane()];
            const int64_t y = ahead_;
            info.row = first + team_.lane();
            info.kept = y != args.formula.ignore_index;
            info.fits = y >= 0 && y < team_.launch.C;
            info.label_member = info.label_slot = info.label_place = -1;
            if (info.kept && info.fits) {
                const Columns columns =
                    columns_of<T>(team_.launch.C, team_.launch.wide_in, row_address(args.streams[0], args.S, info.row));
                const int c = int(y) + columns.phase, v = c / V;
                info.label_member = v & (team_.members() - 1);
                info.label_slot = v >> team_.shift();
                info.label_place = c % V;
            }
            ahead_ = label_of(first + int64_t(team_.launch.teams) * rows + team_.lane());
        }
        if (team_.lane() <= args.K) {
            for (int r = 0; r < rows; ++r) {
                if (first + r < args.N)
                    infos[r].address[team_.lane()] = row_address(args.streams[team_.lane()], args.S, first + r);
            }
        }
        warp_barrier();
    }

    // By one warp for its block: the rows that count, counted here or by an earlier launch.
    CAMKD_DEVICE void prepare_batch() const {
        const RowLossArgs& args = team_.launch.args;
        float inverse = !team_.launch.alone && args.mean.others ? args.mean.others[2] : 1.0f;
        if (team_.launch.alone) {
            int kept = 0;
            for (int64_t n = team_.lane(); n < args.N; n += kWarp) kept += args.target[n] != args.formula.ignore_index;
            inverse = inverse_of(warp_sum(float(kept)));
        }
        if (team_.lane() == 0) {
            team_.of_batch()[0] = inverse;
            team_.of_batch()[1] = args.grad_scale * inverse * (args.grad_scale_device ? *args.grad_scale_device : 1.0f);
        }
    }

    // What the residual waits for, compute_weights of row_math.h with a lane for each teacher and the others for the
    // student.
    CAMKD_DEVICE void compute_weights(const RowInfo& info, int r) const {
        const RowLossArgs& args = team_.launch.args;
        if (team_.launch.debug) check_label(!info.kept || info.fits);
        if (!info.kept) return;
        RowState& state = team_.rows()[r];
        const int K = team_.teachers(), stream = team_.lane() < K ? team_.lane() + 1 : 0;
        const RowSums<float>& sums = state.sums[stream];
        const float sumT = sums.sumT, sum1 = sums.sum1, max = sums.max, log_sum1 = std::log(sum1);
        const float label = info.fits ? *team_.label_at(r, stream) : NAN, ce = log_sum1 - (label - max);
        float weight = 1.0f / float(K);
        if (args.formula.weighting == Weighting::given) {
            if (team_.lane() < K)
                weight = args.weights[team_.lane() * args.weight_stride_k + info.row * args.weight_stride_n];
        } else if (args.formula.weighting == Weighting::confidence && K > 1) {
            float top = -INFINITY, total = 0, others = 0;
            for (int k = 0; k < K; ++k) top = ScalarMath::max(shuffle(ce, k), top);
            const float share = ScalarMath::exp(ScalarMath::difference(ce, top));
            for (int k = 0; k < K; ++k) {
                const float theirs = shuffle(share, k);
                total += theirs;
                if (k != team_.lane()) others += theirs;
            }
            weight = others * (1.0f / (total * float(K - 1)));
        } else if (args.formula.weighting == Weighting::entropy && K > 1) {
            const float entropy = log_sum1 - sums.plogp / sum1, total = over_teachers(entropy);
            weight = 1.0f - ScalarMath::where_positive(total, entropy / total, 1.0f / float(K));
        }
        const float total = over_teachers(weight), scale = team_.grad_scale();
        const float soft_scale = args.formula.soft_weight * args.formula.temperature * scale;
        // The coefficients of the residual take the factors that the exponentials of their references lack.
        const Reference reference(max, team_.temperature().scale);
        bool plain = !reference.far();
        if (team_.lane() < K) {
            const float coefficient = product_or_zero<ScalarMath>(weight, soft_scale / sumT);
            // Weight 0 silences even a NaN.
            plain = plain && (coefficient != 0 || sumT < INFINITY);
            state.coefficients.teacher[team_.lane()] = coefficient * reference.factor();
            state.result.teacher_ce[team_.lane()] = ce;
            state.result.weights[team_.lane()] = weight;
        } else if (team_.lane() == K) {
            state.coefficients.studentT = (soft_scale * total / sumT + label_nan(info)) * reference.factor();
            state.coefficients.student1 =
                label_coefficient(args.formula, scale) / sum1 * team_.temperature().factor1(reference, max);
            state.result.hard = ce;
        }
        if (team_.lane() <= K) state.references[stream] = reference;
        const bool all_plain = !warp_any(!plain);
        if (team_.lane() == 0) state.plain = all_plain;
        warp_barrier();
    }

    static CAMKD_DEVICE float label_nan(const RowInfo& info) { return info.fits ? 0.0f : NAN; }

    // The sum of a number of every teacher, in their order.
    CAMKD_DEVICE float over_teachers(float x) const {
        float sum = 0;
        for (int k = 0; k < team_.teachers(); ++k) sum += shuffle(x, k);
        return sum;
    }

    // The numbers that nothing waits for, compute_losses of row_math.h in the same way, and all of them where they are
    // wanted.
    CAMKD_DEVICE void write_row_stats(const RowInfo& info, int r) const {
        const RowLossArgs& args = team_.launch.args;
        const Formula& formula = args.formula;
        if (info.row >= args.N) return;
        const RowState& state = team_.rows()[r];
        const int K = team_.teachers(), k = team_.lane() < K ? team_.lane() : 0;
        float divergence = 0, hard = 0, soft = 0, loss = 0, ce = 0, weight = 0;
        if (info.kept) {
            const RowSums<float>& z = state.sums[k + 1];
            // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
            divergence = z.cross / (z.sumT * formula.temperature) + std::log(state.sums[0].sumT / z.sumT);
            ce = state.result.teacher_ce[k];
            weight = state.result.weights[k];
            hard = state.result.hard;
            soft = formula.temperature * formula.temperature *
                   over_teachers(product_or_zero<ScalarMath>(weight, divergence));
            // A label outside [0, C) makes the whole row NaN, whatever the weights are.
            loss = product_or_zero<ScalarMath>(formula.hard_weight, hard) +
                   product_or_zero<ScalarMath>(formula.soft_weight, soft) + label_nan(info);
        }
        float* const stats = args.row_stats + info.row;
        // Lanes 0, 1 and 2 write a row of row_stats each.
        static_assert(row_stats::loss == 0 && row_stats::hard == 1 && row_stats::soft == 2);
        if (team_.lane() <= row_stats::soft)
            stats[team_.lane() * args.N] = team_.lane() == row_stats::loss   ? loss
                                           : team_.lane() == row_stats::hard ? hard
                                                                             : soft;
        if (team_.lane() < K) {
            stats[row_stats::divergence(k) * args.N] = divergence;
            stats[row_stats::teacher_ce(K, k) * args.N] = ce;
            stats[row_stats::weight(K, k) * args.N] = weight;
        }
    }

    // Batch b of a row's residual; what is needed next takes its place in the stash.
    CAMKD_DEVICE void write_grad(const RowInfo& info, int r, int b, int parity) const {
        const RowLossArgs& args = team_.launch.args;
        if (info.row >= args.N) return;
        const RowInfo& after = b > 0 ? info : team_.infos(parity ^ 1)[r];
        Batch next = team_.batch_of(after, r, b > 0 ? b - 1 : 0);
        if (!after.kept) next.held = 0;
        char* const out =
            static_cast<char*>(args.grad_student) + info.row * team_.launch.C * element_bytes(args.streams[0].dtype);
        if (args.grad_student != nullptr && info.kept) {
            copies_wait();
            const RowState& state = team_.rows()[r];
            if (Teachers > 0 && state.plain)
                fixed_k_grad(info, state, team_.batch_of(info, r, b), b, out, after, next);
            else
                general_grad(info, state, team_.batch_of(info, r, b), b, out, after, next);
            return;
        }
        if (args.grad_student != nullptr) {
            const Columns columns = columns_of<T>(team_.launch.C, team_.launch.wide_out, out);
            const float zeros[V] = {};
            const int stride = team_.members() * team_.batches();
            for (int v = b * team_.members() + team_.member(); v < columns.vectors; v += stride)
                store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);
        }
        if (b == 0) team_.fetch_batch(after, next);
    }

    // Where the residual is not aligned like the logits it is written by the element.
    CAMKD_DEVICE Columns columns_out(const Batch& batch) const {
        Columns columns = batch.columns;
        if (!team_.launch.wide_out) columns.whole = 0;
        return columns;
    }

    CAMKD_DEVICE void general_grad(const RowInfo& info, const RowState& state, const Batch& batch, int b, char* out,
                                   const RowInfo& after, const Batch& next) const {
        const Columns columns = columns_out(batch);
        const float at_label = label_coefficient(team_.launch.args.formula, team_.grad_scale());
        const int labelled = team_.label_slot(info, b);
#pragma unroll 1
        for (int i = 0; i < batch.count; ++i) {
            if (i < batch.held) {
                float x[V];
                general_grad_vector<T>(team_.stash(), batch, i, team_.launch.args.K, team_.temperature(),
                                       state.references, state.sums, state.coefficients,
                                       i == labelled ? info.label_place : -1, at_label, x);
                store_vector<T>(out, team_.launch.args.streams[0].dtype, columns, batch.vector(i), x);
            }
            team_.fetch_slot(after, next, i);
        }
    }

    CAMKD_DEVICE void fixed_k_grad(const RowInfo& info, const RowState& state, const Batch& batch, int b, char* out,
                                   const RowInfo& after, const Batch& next) const {
        constexpr int K = Known;
        const Columns columns = columns_out(batch);
        const float at_label = label_coefficient(team_.launch.args.formula, team_.grad_scale());
        const int labelled = team_.label_slot(info, b);
        const KnownRow<K> row(state.references, state.coefficients);
        const char* addresses[K + 1];
#pragma unroll
        for (int k = 0; k <= K; ++k) addresses[k] = after.address[k];
#pragma unroll 1
        for (int i = 0; i < batch.count; ++i) {
            if (i < batch.held) {
                float x[V];
                fixed_k_grad_vector<T, K>(team_.stash(), batch.begin + i, team_.temperature(), row,
                                          i == labelled ? info.label_place : -1, at_label, x);
                store_vector<T>(out, team_.launch.args.streams[0].dtype, columns, batch.vector(i), x);
            }
            if (i >= next.held) continue;
            if (whole_vector(next.columns, next.vector(i)))
                fetch_whole<T>(team_.stash(), next, i, addresses, K);
            else
                fetch_elements<T>(team_.stash(), next, i, team_.launch.args.streams, after.address, K);
        }
    }

    // The means, once the whole cluster has written its numbers; a warp each.
    CAMKD_DEVICE void add_up() {
        cluster_barrier(true);
        if (cluster_rank() != 0) return;
        for (int i = thread_id() / kWarp; i < row_stats::per_teacher; i += block_threads() / kWarp) {
            float sum = 0;
            for (int64_t n = team_.lane(); n < team_.launch.args.N; n += kWarp)
                sum += team_.launch.args.row_stats[i * team_.launch.args.N + n];
            sum = warp_sum(sum);
            if (team_.lane() == 0) put_mean(team_.launch.args.mean, i, sum * team_.of_batch()[0]);
        }
        if (thread_id() == 0) team_.launch.args.mean.others[2] = team_.of_batch()[0];
    }

    const Team team_;
    RowStatistics<T, WarpTeams, Teachers> statistics_;
    int64_t ahead_ = 0;  // the label of this lane's row among those after the ones that are prepared
};

template <class T, bool WarpTeams, int Teachers>
CAMKD_KERNEL(kBlockThreads, blocks_per_multiprocessor(Teachers))
row_loss_kernel(CAMKD_PARAMETER RowLaunch launch) {
    RowKernel<T, WarpTeams, Teachers>(launch).run();
}

}  // namespace camkd::cuda
