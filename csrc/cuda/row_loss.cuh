// The logit loss, one kernel for every width: a team of threads (a warp, a block, a cluster of blocks) keeps the K + 1
// rows in shared memory from their only read on, merges its sums, and writes numbers and residual. While the residual
// of a row is written, the next row is fetched into the slots that become free. Rows too wide for that pass through the
// same slots in batches, forwards for the sums and backwards for the residual.
#pragma once

#include "api.h"
#include "batch_mean.cuh"
#include "launch_table.h"
#include "row_sweeps.cuh"

namespace camkd::cuda {

constexpr int kUsualPower = 4;

struct RowLaunch {
    RowLossArgs args;
    RowGeometry geometry;
    Temperature temperature;
    bool alone;     // the grid is one cluster, which counts the rows and adds them up itself
    bool wide_in;   // all inputs are aligned alike, so that rows are read in 16-byte vectors
    bool wide_out;  // and the residual is aligned like them
};

// A row that is in flight, as its team must know it before it looks at a logit.
struct RowInfo {
    const char* address[kMaxStreams];
    float label[kMaxStreams];  // logits at the label, NaN for a label outside [0, C)
    int64_t row, target;
    bool kept, fits;
};

// A row between its statistics and its residual.
struct RowState {
    RowSums<float> sums[kMaxStreams];
    RowResult<float> result;
    ResidualCoefficients<float> coefficients;
    Reference references[kMaxStreams];
};

// Shared memory, in this order: stash, rows in flight (this one and the next), warp states, cluster states.
struct RowShared {
    static constexpr int row_bytes = int(2 * sizeof(RowInfo) + sizeof(RowState));
    CAMKD_HD_MEMBER int states_bytes(int K) { return int(2 * (K + 1) * sizeof(State)); }

    Stash stash;
    RowInfo* infos;  // [parity][row]
    RowState* rows;  // [row]
    State* total;    // the warp's own: [stream], of the batches so far
    State* batch;    // [stream]
    State* all;      // every warp's: `states_of` each
    State* cluster;  // [parity][stream]
    int states_of;

    CAMKD_DEVICE RowShared(const RowLaunch& launch, const Team& team) {
        const RowGeometry& g = launch.geometry;
        const int K = launch.args.K, warps = block_threads() / kWarp, warp = thread_id() / kWarp;
        const int teams = team.is_warp ? warps : 1, mine = team.is_warp ? warp : 0;
        char* at = shared_memory();
        stash = {reinterpret_cast<Pack*>(at) + thread_id(), g.rows * g.slots, block_threads()};
        at += int64_t(K + 1) * g.rows * g.slots * block_threads() * int64_t(sizeof(Pack));
        infos = reinterpret_cast<RowInfo*>(at) + 2 * mine * g.rows;
        at += int64_t(2 * teams * g.rows) * int64_t(sizeof(RowInfo));
        rows = reinterpret_cast<RowState*>(at) + mine * g.rows;
        at += int64_t(teams * g.rows) * int64_t(sizeof(RowState));
        states_of = 2 * (K + 1);
        all = reinterpret_cast<State*>(at);
        total = all + warp * states_of;
        batch = total + K + 1;
        cluster = all + warps * states_of;
    }
};

template <class T, bool WarpTeams, bool Usual>
class RowKernel {
  public:
    CAMKD_DEVICE RowKernel(const RowLaunch& launch)
        : launch_(launch),
          team_(WarpTeams, launch.geometry.cluster),
          shared_(launch, team_),
          lane_(thread_id() % kWarp) {}

    CAMKD_DEVICE void run() {
        const int rows = together(), last = batches() - 1;
        const int64_t sets = (launch_.args.N + rows - 1) / rows;
        int parity = 0;
        if (WarpTeams || thread_id() < kWarp) prepare(team_.index, parity);
        inverse_ = launch_.alone ? inverse_count() : inverse_given();
        team_.barrier();
        fetch_first_batches(parity);
        for (int64_t set = team_.index; set < sets; set += team_.count, parity ^= 1) {
            const RowInfo* infos = shared_.infos + parity * rows;
            for (int r = 0; r < rows; ++r)
                if (infos[r].kept) statistics(infos[r], r);
            team_.barrier();
            // By a warp that does not merge: its loads take a while.
            if (WarpTeams || thread_id() / kWarp == block_threads() / kWarp - 1) prepare(set + team_.count, parity ^ 1);
            if (!WarpTeams && thread_id() < kWarp && infos[0].kept) merge_warps(parity);
            if (team_.cluster > 1) {
                cluster_barrier(thread_id() < kWarp);
                if (thread_id() < kWarp && infos[0].kept) merge_blocks(parity);
            }
            warp_barrier();
            if (team_.lane < rows) finish(infos[team_.lane], shared_.rows[team_.lane]);
            team_.barrier();
            for (int b = launch_.args.residual ? last : 0; b >= 0; --b)
                for (int r = 0; r < rows; ++r) residual(infos[r], r, b, parity);
        }
        // No block of a cluster leaves while another may still read its sums.
        if (team_.cluster > 1) cluster_barrier(false);
        if (launch_.alone) add_up();
    }

  private:
    static constexpr int V = kVector<T>;

    // Rows that the team has in flight together.
    CAMKD_DEVICE int together() const { return WarpTeams ? launch_.geometry.rows : 1; }
    CAMKD_DEVICE Temperature temperature() const {
        return {launch_.temperature.scale, Usual ? kUsualPower : launch_.temperature.power};
    }
    CAMKD_DEVICE bool entropy() const { return !Usual && launch_.args.formula.weighting == Weighting::entropy; }
    CAMKD_DEVICE int batches() const { return WarpTeams ? 1 : launch_.geometry.batches; }

    CAMKD_DEVICE Batch batch_of(const RowInfo& info, int r, int b) const {
        const RowGeometry& g = launch_.geometry;
        const Columns columns = columns_of<T>(launch_.args.C, launch_.wide_in, info.address[0]);
        return {columns, b * g.slots * team_.members + team_.member, team_.members, r * g.slots, g.slots};
    }

    CAMKD_DEVICE void fetch_slot(const RowInfo& info, const Batch& batch, int i) const {
        fetch<T>(shared_.stash, batch, i, launch_.args.streams, info.address, launch_.args.K);
    }

    CAMKD_DEVICE void fetch_first_batches(int parity) const {
        const RowGeometry& g = launch_.geometry;
        for (int r = 0; r < together(); ++r) {
            const RowInfo& info = shared_.infos[parity * together() + r];
            if (!info.kept) continue;
            const Batch batch = batch_of(info, r, 0);
#pragma unroll 1
            for (int i = 0; i < g.slots; ++i) fetch_slot(info, batch, i);
        }
    }

    // Finds the rows of a set, one stream to a lane; an ignored row, or one beyond the last, is not looked at.
    CAMKD_DEVICE void prepare(int64_t set, int parity) {
        const RowLossArgs& args = launch_.args;
        const int rows = together();
        for (int r = 0; r < rows; ++r) {
            RowInfo& info = shared_.infos[parity * rows + r];
            const int64_t row = set * rows + r;
            const int64_t y = row < args.N ? args.target[row] : args.ignore_index;
            const bool kept = y != args.ignore_index, fits = y >= 0 && y < args.C;
            if (kept && lane_ <= args.K) {
                const Matrix& matrix = args.streams[lane_];
                const char* address = row_address(matrix, args.inner, row);
                info.address[lane_] = address;
                info.label[lane_] = fits ? load_element(address, y, matrix.dtype) : NAN;
            }
            if (lane_ == 0) {
                info.row = row;
                info.target = y;
                info.kept = kept;
                info.fits = fits;
            }
        }
        warp_barrier();
    }

    // The warp's sums of one row, in `total` for a block to merge, or as the row's own where the team is the warp.
    CAMKD_DEVICE void statistics(const RowInfo& info, int r) {
        const RowLossArgs& args = launch_.args;
        const float inverse_t = 1.0f / args.formula.temperature;
        for (int b = 0; b < batches(); ++b) {
            copies_wait();
            const Batch batch = batch_of(info, r, b);
            State* states = b == 0 ? shared_.total : shared_.batch;
            for (int k = 0; k <= args.K; ++k) {
                const float max = warp_max(stash_max<T>(shared_.stash, batch, k));
                if (lane_ == 0) states[k].max = max;
            }
            warp_barrier();
            const bool more = b + 1 < batches();
            stash_sums<T, Usual ? V : 4>(shared_.stash, batch, args.K, entropy(), temperature(), lane_, states,
                                         [&](int i) {
                                             if (more) fetch_slot(info, batch_of(info, r, b + 1), i);
                                         });
            if (b > 0 && lane_ == 0) merge_states(shared_.total, shared_.batch, args.K, inverse_t);
            warp_barrier();
        }
        if (WarpTeams) {
            if (lane_ <= args.K) put(lane_, shared_.total[lane_], shared_.rows[r].sums);
            warp_barrier();
        }
    }

    static CAMKD_DEVICE void put(int k, const State& state, RowSums<float>* sums) {
        sums[k].max = state.max;
        sums[k].sum_t = state.sum_t;
        sums[k].sum_1 = state.sum_1;
        sums[k].cross = state.cross;
        sums[k].entropy = state.entropy;
    }

    CAMKD_DEVICE void merge_warps(int parity) {
        const int K = launch_.args.K;
        State* const block = shared_.cluster + parity * (K + 1);
        merge_lanes(
            lane_, block_threads() / kWarp, K, 1.0f / launch_.args.formula.temperature,
            [&](int lane, int k) { return shared_.all[lane * shared_.states_of + k]; },
            [&](int k, const State& state) {
                if (team_.cluster > 1)
                    block[k] = state;
                else
                    put(k, state, shared_.rows[0].sums);
            });
    }

    // Every block merges the blocks of its cluster, in order of their ranks: the same bits everywhere. The two parities
    // keep a block's next sums apart from those that slower blocks still read: one cluster barrier per row is enough.
    CAMKD_DEVICE void merge_blocks(int parity) {
        const int K = launch_.args.K;
        const State* const block = shared_.cluster + parity * (K + 1);
        merge_lanes(
            lane_, team_.cluster, K, 1.0f / launch_.args.formula.temperature,
            [&](int lane, int k) {
                State state;
                state.max = load_remote(&block[k].max, lane);
                state.sum_t = load_remote(&block[k].sum_t, lane);
                state.sum_1 = load_remote(&block[k].sum_1, lane);
                state.cross = load_remote(&block[k].cross, lane);
                state.entropy = load_remote(&block[k].entropy, lane);
                return state;
            },
            [&](int k, const State& state) { put(k, state, shared_.rows[0].sums); });
    }

    // 1 / rows that count, by every warp for itself.
    CAMKD_DEVICE float inverse_count() const {
        const RowLossArgs& args = launch_.args;
        int kept = 0;
        for (int64_t n = lane_; n < args.N; n += kWarp) kept += args.target[n] != args.ignore_index;
        return inverse_of(warp_sum(float(kept)));
    }

    // As an earlier launch left it.
    CAMKD_DEVICE float inverse_given() const { return launch_.args.mean.others ? launch_.args.mean.others[2] : 1.0f; }

    CAMKD_DEVICE float residual_scale() const {
        const RowLossArgs& args = launch_.args;
        const float scale = args.residual_scale * inverse_;
        return args.residual_factor ? scale * *args.residual_factor : scale;
    }

    // One thread's work: everything of a row that is not C wide.
    CAMKD_DEVICE void finish(const RowInfo& info, RowState& state) {
        const RowLossArgs& args = launch_.args;
        const int K = args.K;
        if (info.row >= args.N) return;
        const bool kept = info.kept;
        if (args.debug) check_label(!kept || info.fits);
        if (kept) {
            for (int k = 0; k <= K; ++k) state.sums[k].label = info.label[k];
            if (args.formula.weighting == Weighting::given) {
                for (int k = 0; k < K; ++k)
                    state.result.weights[k] = args.weights[k * args.weight_stride_k + info.row * args.weight_stride_n];
            }
            finish_row<ScalarMath>(args.formula, K, state.sums[0], state.sums + 1, info.fits ? 0.0f : NAN,
                                   residual_scale(), state.result, state.coefficients);
            refer(state);
        }
        if (team_.rank != 0) return;
        float* at = args.numbers + info.row;
        const auto write = [&](float x) {
            *at = kept ? x : 0.0f;
            at += args.N;
        };
        write(state.result.loss);
        write(state.result.hard);
        write(state.result.soft);
        for (int k = 0; k < K; ++k) write(state.result.divergence[k]);
        for (int k = 0; k < K; ++k) write(state.result.teacher_ce[k]);
        for (int k = 0; k < K; ++k) write(state.result.weights[k]);
    }

    // What the residual needs instead of maxima; its coefficients take the factors of their exponentials.
    CAMKD_DEVICE void refer(RowState& state) const {
        const Temperature temperature = this->temperature();
        for (int k = 0; k <= launch_.args.K; ++k) {
            const float max = state.sums[k].max;
            const Reference reference(max, temperature.scale);
            state.references[k] = reference;
            if (k == 0) {
                state.coefficients.student_t *= reference.factor();
                state.coefficients.student_1 *= temperature.factor_1(reference, max);
            } else {
                state.coefficients.teacher[k - 1] *= reference.factor();
            }
        }
    }

    // Batch b of a row's residual; what is needed next takes its place in the stash.
    CAMKD_DEVICE void residual(const RowInfo& info, int r, int b, int parity) {
        const RowLossArgs& args = launch_.args;
        const RowGeometry& g = launch_.geometry;
        if (info.row >= args.N) return;
        const RowInfo& after = b > 0 ? info : shared_.infos[(parity ^ 1) * together() + r];
        const bool more = after.kept;
        const auto fetch_next = [&](int i) {
            if (more) fetch_slot(after, batch_of(after, r, b > 0 ? b - 1 : 0), i);
        };
        const bool wanted = args.residual != nullptr;
        char* const out = static_cast<char*>(args.residual) + info.row * args.C * element_bytes(args.streams[0].dtype);
        if (wanted && info.kept) {
            copies_wait();
            const Batch batch = batch_of(info, r, b);
            const RowState& state = shared_.rows[r];
            const float at_label = label_coefficient(args.formula, residual_scale());
            const int64_t label = info.fits ? info.target + batch.columns.phase : -V;
            for (int i = 0; i < g.slots; ++i) {
                if (batch.holds(i)) {
                    float x[V];
                    residual_vector<T>(shared_.stash, batch, i, args.K, temperature(), state.references, state.sums,
                                       state.coefficients, label, at_label, x);
                    store_vector<T>(out, args.streams[0].dtype, batch.columns, launch_.wide_out, batch.vector(i), x);
                }
                fetch_next(i);
            }
            return;
        }
        if (wanted) {
            const Columns columns = columns_of<T>(args.C, launch_.wide_out, out);
            const float zeros[V] = {};
            const int stride = team_.members * batches();
            for (int v = b * team_.members + team_.member; v < columns.vectors; v += stride)
                store_vector<T>(out, args.streams[0].dtype, columns, launch_.wide_out, v, zeros);
        }
        if (b == 0) {
#pragma unroll 1
            for (int i = 0; i < g.slots; ++i) fetch_next(i);
        }
    }

    // The means, once the whole cluster has written its numbers; a warp each.
    CAMKD_DEVICE void add_up() {
        cluster_barrier(true);
        if (cluster_rank() != 0) return;
        for (int i = thread_id() / kWarp; i < 3; i += block_threads() / kWarp) {
            float sum = 0;
            for (int64_t n = lane_; n < launch_.args.N; n += kWarp) sum += launch_.args.numbers[i * launch_.args.N + n];
            sum = warp_sum(sum);
            if (lane_ == 0) put_mean(launch_.args.mean, i, sum * inverse_);
        }
        if (thread_id() == 0) launch_.args.mean.others[2] = inverse_;
    }

    const RowLaunch& launch_;
    const Team team_;
    RowShared shared_;
    const int lane_;
    float inverse_ = 1;
};

// `Usual`: T = 4 and no entropies, which saves a tenth of all instructions as a constant of the compiler.
template <class T, bool WarpTeams, bool Usual>
CAMKD_KERNEL(kBlockThreads, kBlocksPerMultiprocessor)
row_loss_kernel(CAMKD_PARAMETER RowLaunch launch) {
    RowKernel<T, WarpTeams, Usual>(launch).run();
}

}  // namespace camkd::cuda
