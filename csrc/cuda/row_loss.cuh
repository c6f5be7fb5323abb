// The logit loss, one kernel for every width: a team of threads (a warp, a block, a cluster of blocks) keeps the K + 1
// rows in shared memory from their only read on, merges its sums, and writes numbers and residual. While the residual
// of a row is written, the next row is fetched into the slots that become free. Rows too wide for that pass through the
// same slots in batches, forwards for the sums and backwards for the residual.
#pragma once

#include "api.h"
#include "batch_mean.cuh"
#include "known_sweeps.cuh"
#include "launch_table.h"

namespace camkd::cuda {

struct RowLaunch {
    RowLossArgs args;
    RowGeometry geometry;
    Temperature temperature;
    bool alone;     // the grid is one cluster, which counts the rows and adds them up itself
    bool wide_in;   // all inputs are aligned alike, so that rows are read in 16-byte vectors
    bool wide_out;  // and the residual is aligned like them
    // What follows from the above; a kernel takes it from here rather than keep it in registers.
    int teams;  // of the grid
    int shift;  // 1 << shift threads to a team
    // Where the parts of shared memory begin, in bytes; the stash comes first.
    int batch, labels, inbox, inbox_labels, outgoing, boxes, infos, rows, states;
};

// A row that is in flight, as its team must know it before it looks at a logit.
struct RowInfo {
    const char* address[kMaxStreams];
    int64_t row;
    // The label's column: member of the team that has it, its slot over all batches, place in the vector; -1 for a
    // label outside [0, C).
    int label_member, label_slot, label_place;
    bool kept, fits;
};

// A row between its statistics and its residual.
struct RowState {
    RowSums<float> sums[kMaxStreams];
    RowResult<float> result;
    ResidualCoefficients<float> coefficients;
    Reference references[kMaxStreams];
    bool plain;  // nothing that only the sweeps for any row can do
};

// Shared memory: stash, logits at the label, what the blocks of a cluster send each other, rows in flight (this one and
// the next), warp states.
struct RowShared {
    static constexpr int pack_bytes = int(sizeof(Pack));
    static int streams_bytes(int K, bool known) { return (K + 1) * packs(known) * pack_bytes; }
    static int label_bytes(int K) { return (K + 4) / 4 * pack_bytes; }

    // A stream's state takes so many packs on its way to other blocks: entropies are of no use to known kernels.
    CAMKD_HD_MEMBER int packs(bool known) { return known ? 1 : 2; }

    // What the launch table must know of it.
    static void measure(RowProblem& problem, bool known) {
        const int K = problem.K;
        problem.row_bytes = int(2 * sizeof(RowInfo) + sizeof(RowState));
        problem.warp_bytes = int(2 * (K + 1) * sizeof(State));
        problem.block_bytes = pack_bytes + label_bytes(K);
        problem.cluster_bytes = 2 * label_bytes(K) + streams_bytes(K, known) + 2 * int(sizeof(Mailbox));
        problem.rank_bytes = 2 * streams_bytes(K, known);
    }

    // Fills in what follows from arguments and geometry.
    static void lay_out(RowLaunch& launch, const RowProblem& problem, bool known) {
        const RowGeometry& g = launch.geometry;
        const int K = problem.K, warps = g.threads / kWarpThreads, teams = g.warp_teams ? warps : 1;
        launch.teams = int(g.warp_teams ? g.blocks * warps : g.blocks / g.cluster);
        launch.shift = 0;
        while (1 << launch.shift < (g.warp_teams ? kWarpThreads : g.threads * g.cluster)) ++launch.shift;
        int at = (K + 1) * g.rows * g.slots * g.threads * pack_bytes;
        const auto take = [&](int& offset, int bytes) {
            offset = at;
            at += bytes;
        };
        take(launch.batch, pack_bytes);
        take(launch.labels, label_bytes(K));
        if (!g.warp_teams && g.cluster > 1) {
            take(launch.inbox, g.cluster * problem.rank_bytes);
            take(launch.inbox_labels, 2 * label_bytes(K));
            take(launch.outgoing, streams_bytes(K, known));
            take(launch.boxes, 2 * int(sizeof(Mailbox)));
        }
        take(launch.infos, 2 * teams * g.rows * int(sizeof(RowInfo)));
        take(launch.rows, teams * g.rows * int(sizeof(RowState)));
        launch.states = at;
    }
};

// `Teachers`: how many there are, for the sweeps of known_sweeps.cuh; 0 for any number, temperature and weighting.
template <class T, bool WarpTeams, int Teachers>
class RowKernel {
  public:
    CAMKD_DEVICE RowKernel(const RowLaunch& launch) : launch_(launch), rank_(WarpTeams ? 0 : cluster_rank()) {}

    CAMKD_DEVICE void run() {
        if (prepares()) {
            const int team = WarpTeams ? int(block_id()) * warps() + warp() : int(block_id()) / cluster();
            const int64_t first = int64_t(team) * together();
            ahead_ = label_of(first + lane());
            prepare(first, 0);
        }
        if (warp() == 0) prepare_batch();
        if (cluster() > 1) {
            if (thread_id() < 2) mailbox_open(box(thread_id()));
            cluster_barrier(true);
        }
        block_barrier();
        fetch_first_batches(0);
        for (int turn = 0; infos(turn & 1)[0].row < launch_.args.N; ++turn) {
            const int parity = turn & 1;
            const RowInfo* const infos = this->infos(parity);
#pragma unroll 1
            for (int r = 0; r < together(); ++r)
                if (infos[r].kept) statistics(infos[r], r);
            barrier();
            if (prepares()) prepare(infos[0].row + int64_t(launch_.teams) * together(), parity ^ 1);
            if (!WarpTeams && merges() && infos[0].kept) {
                merge_warps();
                if (cluster() > 1) merge_blocks(infos[0]);
                warp_barrier();
            }
            if (merges()) {
#pragma unroll 1
                for (int r = 0; r < together(); ++r) {
                    weigh(infos[r], r);
                    if (WarpTeams) score(infos[r], r);
                }
            }
            barrier();
            // Not by the warp that the next row waits for most, and by one block after the other.
            if (!WarpTeams && prepares() && (turn & (cluster() - 1)) == rank_) score(infos[0], 0);
            for (int b = launch_.args.residual ? batches() - 1 : 0; b >= 0; --b) {
#pragma unroll 1
                for (int r = 0; r < together(); ++r) residual(infos[r], r, b, parity);
            }
        }
        if (launch_.alone) add_up();
    }

  private:
    static constexpr int V = kVector<T>;
    static constexpr int Known = Teachers > 0 ? Teachers : 1;  // of what is never run where it is not known

    CAMKD_DEVICE int lane() const { return thread_id() % kWarp; }
    CAMKD_DEVICE int warp() const { return thread_id() / kWarp; }
    CAMKD_DEVICE int warps() const { return block_threads() / kWarp; }
    // Of a team; clusters of warp teams share nothing but the end of a whole batch.
    CAMKD_DEVICE int cluster() const { return has_clusters() && !WarpTeams ? launch_.geometry.cluster : 1; }
    CAMKD_DEVICE int members() const { return WarpTeams ? kWarp : 1 << launch_.shift; }
    CAMKD_DEVICE int shift() const { return WarpTeams ? 5 : launch_.shift; }
    CAMKD_DEVICE int member() const { return WarpTeams ? lane() : rank_ * block_threads() + thread_id(); }
    // Which warp looks ahead, and which one merges: two where there are two.
    CAMKD_DEVICE bool prepares() const { return WarpTeams || warp() == warps() - 1; }
    CAMKD_DEVICE bool merges() const { return WarpTeams || warp() == 0; }
    CAMKD_DEVICE void barrier() const {
        if (WarpTeams)
            warp_barrier();
        else
            block_barrier();
    }

    CAMKD_DEVICE Stash stash() const {
        const RowGeometry& g = launch_.geometry;
        return {reinterpret_cast<Pack*>(shared_memory()) + thread_id(), together() * g.slots, block_threads()};
    }
    CAMKD_DEVICE RowInfo* infos(int parity) const {
        return reinterpret_cast<RowInfo*>(shared_memory() + launch_.infos) +
               ((WarpTeams ? 2 * warp() : 0) + parity) * together();
    }
    CAMKD_DEVICE RowState* rows() const {
        return reinterpret_cast<RowState*>(shared_memory() + launch_.rows) + (WarpTeams ? warp() * together() : 0);
    }
    // Two to a stream and warp: sums of all batches so far, and those of a batch.
    CAMKD_DEVICE State* states(int warp, int batch) const {
        return reinterpret_cast<State*>(shared_memory() + launch_.states) + (2 * warp + batch) * (teachers() + 1);
    }
    // Where the logit at the label of a row goes, in the block that has it.
    CAMKD_DEVICE float* label_at(int r, int k) const {
        return WarpTeams ? &rows()[r].sums[k].label : reinterpret_cast<float*>(shared_memory() + launch_.labels) + k;
    }
    // What this block sends of a stream, and what it was sent by the block of a rank.
    CAMKD_DEVICE Pack* outgoing(int k) const {
        return reinterpret_cast<Pack*>(shared_memory() + launch_.outgoing) + k * packs();
    }
    CAMKD_DEVICE Pack* inbox(int turn, int rank, int k) const {
        const int i = (turn % 2 * cluster() + rank) * (teachers() + 1) + k;
        return reinterpret_cast<Pack*>(shared_memory() + launch_.inbox) + i * packs();
    }
    CAMKD_DEVICE Pack* inbox_labels(int turn) const {
        return reinterpret_cast<Pack*>(shared_memory() + launch_.inbox_labels) + turn % 2 * label_packs();
    }
    CAMKD_DEVICE Mailbox* box(int turn) const {
        return reinterpret_cast<Mailbox*>(shared_memory() + launch_.boxes) + turn % 2;
    }
    CAMKD_DEVICE int packs() const { return RowShared::packs(Teachers > 0); }
    CAMKD_DEVICE int label_packs() const { return (teachers() + 4) / 4; }

    // Rows that the team has in flight together.
    CAMKD_DEVICE int together() const { return WarpTeams ? launch_.geometry.rows : 1; }
    CAMKD_DEVICE int teachers() const { return Teachers > 0 ? Teachers : launch_.args.K; }
    CAMKD_DEVICE const Temperature& temperature() const { return launch_.temperature; }
    CAMKD_DEVICE bool entropy() const { return Teachers == 0 && launch_.args.formula.weighting == Weighting::entropy; }
    CAMKD_DEVICE int batches() const { return WarpTeams ? 1 : launch_.geometry.batches; }

    CAMKD_DEVICE Batch batch_of(const RowInfo& info, int r, int b) const {
        const RowGeometry& g = launch_.geometry;
        const Columns columns = columns_of<T>(launch_.args.C, launch_.wide_in, info.address[0]);
        const int first = (b * g.slots << shift()) + member(), left = columns.vectors - first;
        const int held = left > 0 ? (left + members() - 1) >> shift() : 0;
        return {columns, first, members(), r * g.slots, g.slots, held < g.slots ? held : g.slots};
    }

    CAMKD_DEVICE void fetch_slot(const RowInfo& info, const Batch& batch, int i) const {
        if (i >= batch.held) return;
        if (whole_vector(batch.columns, batch.vector(i)))
            fetch_whole<T>(stash(), batch, i, info.address, teachers());
        else
            fetch_elements<T>(stash(), batch, i, launch_.args.streams, info.address, teachers());
    }

    CAMKD_DEVICE void fetch_batch(const RowInfo& info, const Batch& batch) const {
#pragma unroll 1
        for (int i = 0; i < batch.held; ++i) fetch_slot(info, batch, i);
    }

    CAMKD_DEVICE void fetch_first_batches(int parity) const {
        for (int r = 0; r < together(); ++r) {
            const RowInfo& info = infos(parity)[r];
            if (info.kept) fetch_batch(info, batch_of(info, r, 0));
        }
    }

    CAMKD_DEVICE int64_t label_of(int64_t row) const {
        const RowLossArgs& args = launch_.args;
        return row < args.N ? args.target[row] : args.ignore_index;
    }

    // Finds the team's next rows from `first` on, a row or a stream to each lane; an ignored row, or one beyond the
    // last, is not looked at. Asks for the labels of those after them, which take a while to come.
    CAMKD_DEVICE void prepare(int64_t first, int parity) {
        const RowLossArgs& args = launch_.args;
        const int rows = together();
        RowInfo* const infos = this->infos(parity);
        if (lane() < rows) {
            RowInfo& info = infos[lane()];
            const int64_t y = ahead_;
            info.row = first + lane();
            info.kept = y != args.ignore_index;
            info.fits = y >= 0 && y < args.C;
            info.label_member = info.label_slot = info.label_place = -1;
            if (info.kept && info.fits) {
                const Columns columns =
                    columns_of<T>(args.C, launch_.wide_in, row_address(args.streams[0], args.inner, info.row));
                const int c = int(y) + columns.phase, v = c / V;
                info.label_member = v & (members() - 1);
                info.label_slot = v >> shift();
                info.label_place = c % V;
            }
            ahead_ = label_of(first + int64_t(launch_.teams) * rows + lane());
        }
        if (lane() <= args.K) {
            for (int r = 0; r < rows; ++r) {
                if (first + r < args.N)
                    infos[r].address[lane()] = row_address(args.streams[lane()], args.inner, first + r);
            }
        }
        warp_barrier();
    }

    // The slot of batch b in which this thread has the label; none of its slots where another has it.
    CAMKD_DEVICE int label_slot(const RowInfo& info, int b) const {
        return member() == info.label_member ? info.label_slot - b * launch_.geometry.slots : -1;
    }

    CAMKD_DEVICE void publish_labels(const RowInfo& info, int r, const Batch& batch, int b) const {
        const int i = label_slot(info, b);
        if (unsigned(i) >= unsigned(batch.held)) return;
        for (int k = 0; k <= teachers(); ++k) {
            const float x = element_of<T>(*stash().slot(k, batch.begin + i), info.label_place);
            *label_at(r, k) = x;
        }
    }

    // The warp's sums of one row, in `total` for a block to merge, or as the row's own where the team is the warp.
    CAMKD_DEVICE void statistics(const RowInfo& info, int r) {
        const int K = teachers();
        for (int b = 0; b < batches(); ++b) {
            copies_wait();
            const Batch batch = batch_of(info, r, b);
            publish_labels(info, r, batch, b);
            State* const sums = states(warp(), b > 0);
            const bool more = b + 1 < batches();
            if (Teachers == 0 || !known_statistics(batch, sums)) any_statistics(batch, sums);
            if (more) fetch_batch(info, batch_of(info, r, b + 1));
            if (b > 0) add_batch();
        }
        if (WarpTeams) {
            if (lane() <= K) put(lane(), states(warp(), 0)[lane()], rows()[r].sums);
            warp_barrier();
        }
    }

    CAMKD_DEVICE void any_statistics(const Batch& batch, State* states) const {
        const int K = launch_.args.K;
        for (int k = 0; k <= K; ++k) {
            const float max = warp_max(stash_max<T>(stash(), batch, k));
            if (lane() == 0) states[k].max = max;
        }
        warp_barrier();
        stash_sums<T, 4>(stash(), batch, K, entropy(), temperature(), lane(), states);
        warp_barrier();
    }

    // False, and nothing done, for rows that it is not made for.
    CAMKD_DEVICE bool known_statistics(const Batch& batch, State* states) const {
        constexpr int K = Known, count = kSums * (K + 1), stride = fold_stride<count>;
        const float scale = temperature().scale;
        float max[K + 1], at[K + 1], sums[count];
        known_maxima<T, K>(stash(), batch, lane(), max);
        bool far = false;
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            const Reference reference(max[k], scale);
            at[k] = reference.at;
            far = far || reference.far();
        }
        if (far) return false;
        if (lane() == 0) {
#pragma unroll
            for (int k = 0; k <= K; ++k) states[k].max = max[k];
        }
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] = 0;
        with_power(temperature().power,
                   [&](auto power) { known_sums<T, K, decltype(power)::value>(stash(), batch, scale, at, sums); });
        const float sum = warp_fold(sums, lane(), 0.0f, [](float a, float b) { return a + b; });
        if (lane() % stride == 0 && lane() / stride < count)
            numbers_of(states + lane() / stride / kSums)[1 + lane() / stride % kSums] = sum;
        warp_barrier();
        if (lane() <= K) {
            // Back from scaled distances to logits, and what the references lack.
            State& to = states[lane()];
            const Reference reference(to.max, scale), of_student(states[0].max, scale);
            const float factor = reference.factor(), sum_t = to.sum_t;
            to.cross = (to.cross - (reference.left() - of_student.left()) * sum_t) * (factor * temperature().inverse);
            to.sum_t = sum_t * factor;
            to.sum_1 *= temperature().factor_1(reference, to.max);
        }
        warp_barrier();
        return true;
    }

    // The sums of a batch to those of the batches before it.
    CAMKD_DEVICE void add_batch() const {
        if constexpr (Teachers > 0) {
            known_merge<Known>(
                lane(), 2, temperature().scale, [&](int lane, int k) { return states(warp(), lane)[k]; },
                [&](int k, int field, float value) { numbers_of(states(warp(), 0) + k)[field] = value; });
        } else if (lane() == 0) {
            merge_states(states(warp(), 0), states(warp(), 1), teachers(), inverse_t());
        }
        warp_barrier();
    }

    // The numbers of a state or of a row's sums, in the order of their declarations.
    template <class Numbers>
    static CAMKD_DEVICE float* numbers_of(Numbers* of) {
        static_assert(sizeof(Numbers) % sizeof(float) == 0);
        return &of->max;
    }

    CAMKD_DEVICE float inverse_t() const { return 1.0f / launch_.args.formula.temperature; }

    static CAMKD_DEVICE void put(int k, const State& state, RowSums<float>* sums) {
        sums[k].max = state.max;
        sums[k].sum_t = state.sum_t;
        sums[k].sum_1 = state.sum_1;
        sums[k].cross = state.cross;
        sums[k].entropy = state.entropy;
    }

    // The states of this block's warps: the row's sums, or what the cluster is sent.
    CAMKD_DEVICE void merge_warps() {
        RowSums<float>* const row = rows()[0].sums;
        const auto load = [&](int lane, int k) { return states(lane, 0)[k]; };
        if constexpr (Teachers > 0) {
            known_merge<Known>(lane(), warps(), temperature().scale, load, [&](int k, int field, float value) {
                if (cluster() > 1)
                    outgoing(k)->word[field] = float_to_bits(value);
                else
                    numbers_of(row + k)[field] = value;
            });
        } else {
            merge_lanes(lane(), warps(), teachers(), inverse_t(), load, [&](int k, const State& state) {
                if (cluster() > 1) {
                    outgoing(k)[0] = {{float_to_bits(state.max), float_to_bits(state.sum_t), float_to_bits(state.sum_1),
                                       float_to_bits(state.cross)}};
                    outgoing(k)[1] = {{float_to_bits(state.entropy), 0, 0, 0}};
                } else {
                    put(k, state, row);
                }
            });
        }
    }

    // Every block merges the blocks of its cluster, in order of their ranks: the same bits everywhere. Two inboxes by
    // turns: a block that sends for the row after the next has had everybody's messages for the next one, and each of
    // those was sent after its sender had read the inbox of this row.
    CAMKD_DEVICE void merge_blocks(const RowInfo& info) {
        const int turn = turns_++, count = (teachers() + 1) * packs();
        RowSums<float>* const row = rows()[0].sums;
        warp_barrier();
        if (lane() == 0)
            mailbox_expect(box(turn), (cluster() * count + (info.fits ? label_packs() : 0)) * RowShared::pack_bytes);
        for (int i = lane(); i < cluster() * count; i += kWarp)
            mailbox_send(box(turn), i / count, inbox(turn, rank_, 0) + i % count, outgoing(0)[i % count]);
        if (info.fits && info.label_member / block_threads() == rank_) {
            const Pack* const labels = reinterpret_cast<const Pack*>(label_at(0, 0));
            for (int i = lane(); i < cluster() * label_packs(); i += kWarp)
                mailbox_send(box(turn), i % cluster(), inbox_labels(turn) + i / cluster(), labels[i / cluster()]);
        }
        mailbox_wait(box(turn), turn / 2);
        const auto load = [&](int rank, int k) {
            const Pack* const from = inbox(turn, rank, k);
            State state;
            state.max = bits_to_float(from->word[0]);
            state.sum_t = bits_to_float(from->word[1]);
            state.sum_1 = bits_to_float(from->word[2]);
            state.cross = bits_to_float(from->word[3]);
            if (Teachers == 0) state.entropy = bits_to_float(from[1].word[0]);
            return state;
        };
        if constexpr (Teachers > 0) {
            known_merge<Known>(lane(), cluster(), temperature().scale, load,
                               [&](int k, int field, float value) { numbers_of(row + k)[field] = value; });
        } else {
            merge_lanes(lane(), cluster(), teachers(), inverse_t(), load,
                        [&](int k, const State& state) { put(k, state, row); });
        }
        if (info.fits) {
            for (int k = lane(); k <= teachers(); k += kWarp)
                *label_at(0, k) = bits_to_float(inbox_labels(turn)[k / 4].word[k % 4]);
        }
    }

    // Two numbers of the batch, by one warp for its block: 1 / rows that count, as counted here or by an earlier
    // launch, and what the residual is multiplied by.
    CAMKD_DEVICE float* of_batch() const { return reinterpret_cast<float*>(shared_memory() + launch_.batch); }
    CAMKD_DEVICE void prepare_batch() const {
        const RowLossArgs& args = launch_.args;
        float inverse = !launch_.alone && args.mean.others ? args.mean.others[2] : 1.0f;
        if (launch_.alone) {
            int kept = 0;
            for (int64_t n = lane(); n < args.N; n += kWarp) kept += args.target[n] != args.ignore_index;
            inverse = inverse_of(warp_sum(float(kept)));
        }
        if (lane() == 0) {
            of_batch()[0] = inverse;
            of_batch()[1] = args.residual_scale * inverse * (args.residual_factor ? *args.residual_factor : 1.0f);
        }
    }

    CAMKD_DEVICE float residual_scale() const { return of_batch()[1]; }

    // What the residual waits for, weigh_row of row_math.h with a lane for each teacher and the others for the student.
    CAMKD_DEVICE void weigh(const RowInfo& info, int r) const {
        const RowLossArgs& args = launch_.args;
        if (args.debug) check_label(!info.kept || info.fits);
        if (!info.kept) return;
        RowState& state = rows()[r];
        const int K = teachers(), stream = lane() < K ? lane() + 1 : 0;
        const RowSums<float>& sums = state.sums[stream];
        const float sum_t = sums.sum_t, sum_1 = sums.sum_1, max = sums.max, log_1 = std::log(sum_1);
        const float label = info.fits ? *label_at(r, stream) : NAN, ce = log_1 - (label - max);
        float weight = 1.0f / float(K);
        if (args.formula.weighting == Weighting::given) {
            if (lane() < K) weight = args.weights[lane() * args.weight_stride_k + info.row * args.weight_stride_n];
        } else if (args.formula.weighting == Weighting::confidence && K > 1) {
            float top = -INFINITY, total = 0, others = 0;
            for (int k = 0; k < K; ++k) top = ScalarMath::max(shuffle(ce, k), top);
            const float share = ScalarMath::exp(ScalarMath::difference(ce, top));
            for (int k = 0; k < K; ++k) {
                const float theirs = shuffle(share, k);
                total += theirs;
                if (k != lane()) others += theirs;
            }
            weight = others * (1.0f / (total * float(K - 1)));
        } else if (args.formula.weighting == Weighting::entropy && K > 1) {
            const float entropy = log_1 - sums.entropy / sum_1, total = over_teachers(entropy);
            weight = 1.0f - ScalarMath::where_positive(total, entropy / total, 1.0f / float(K));
        }
        const float total = over_teachers(weight), scale = residual_scale();
        const float soft_scale = args.formula.soft_weight * args.formula.temperature * scale;
        // The coefficients of the residual take the factors that the exponentials of their references lack.
        const Reference reference(max, temperature().scale);
        bool plain = !reference.far();
        if (lane() < K) {
            const float coefficient = product_or_zero<ScalarMath>(weight, soft_scale / sum_t);
            // Weight 0 silences even a NaN.
            plain = plain && (coefficient != 0 || sum_t < INFINITY);
            state.coefficients.teacher[lane()] = coefficient * reference.factor();
            state.result.teacher_ce[lane()] = ce;
            state.result.weights[lane()] = weight;
        } else if (lane() == K) {
            state.coefficients.student_t = (soft_scale * total / sum_t + unfit(info)) * reference.factor();
            state.coefficients.student_1 =
                label_coefficient(args.formula, scale) / sum_1 * temperature().factor_1(reference, max);
            state.result.hard = ce;
        }
        if (lane() <= K) state.references[stream] = reference;
        const bool all_plain = !warp_any(!plain);
        if (lane() == 0) state.plain = all_plain;
        warp_barrier();
    }

    static CAMKD_DEVICE float unfit(const RowInfo& info) { return info.fits ? 0.0f : NAN; }

    // The sum of a number of every teacher, in their order.
    CAMKD_DEVICE float over_teachers(float x) const {
        float sum = 0;
        for (int k = 0; k < teachers(); ++k) sum += shuffle(x, k);
        return sum;
    }

    // The numbers that nothing waits for, score_row of row_math.h in the same way, and all of them where they are
    // wanted.
    CAMKD_DEVICE void score(const RowInfo& info, int r) const {
        const RowLossArgs& args = launch_.args;
        const Formula& formula = args.formula;
        if (info.row >= args.N) return;
        const RowState& state = rows()[r];
        const int K = teachers(), k = lane() < K ? lane() : 0;
        float divergence = 0, hard = 0, soft = 0, loss = 0, ce = 0, weight = 0;
        if (info.kept) {
            const RowSums<float>& z = state.sums[k + 1];
            // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
            divergence = z.cross / (z.sum_t * formula.temperature) + std::log(state.sums[0].sum_t / z.sum_t);
            ce = state.result.teacher_ce[k];
            weight = state.result.weights[k];
            hard = state.result.hard;
            soft = formula.temperature * formula.temperature *
                   over_teachers(product_or_zero<ScalarMath>(weight, divergence));
            // A label outside [0, C) makes the whole row NaN, whatever the weights are.
            loss = product_or_zero<ScalarMath>(formula.hard_weight, hard) +
                   product_or_zero<ScalarMath>(formula.soft_weight, soft) + unfit(info);
        }
        float* const numbers = args.numbers + info.row;
        if (lane() < 3) numbers[lane() * args.N] = lane() == 0 ? loss : lane() == 1 ? hard : soft;
        if (lane() < K) {
            numbers[(3 + k) * args.N] = divergence;
            numbers[(3 + K + k) * args.N] = ce;
            numbers[(3 + 2 * K + k) * args.N] = weight;
        }
    }

    // Batch b of a row's residual; what is needed next takes its place in the stash.
    CAMKD_DEVICE void residual(const RowInfo& info, int r, int b, int parity) const {
        const RowLossArgs& args = launch_.args;
        if (info.row >= args.N) return;
        const RowInfo& after = b > 0 ? info : infos(parity ^ 1)[r];
        Batch next = batch_of(after, r, b > 0 ? b - 1 : 0);
        if (!after.kept) next.held = 0;
        char* const out = static_cast<char*>(args.residual) + info.row * args.C * element_bytes(args.streams[0].dtype);
        if (args.residual != nullptr && info.kept) {
            copies_wait();
            const RowState& state = rows()[r];
            if (Teachers > 0 && state.plain)
                known_residuals(info, state, batch_of(info, r, b), b, out, after, next);
            else
                any_residuals(info, state, batch_of(info, r, b), b, out, after, next);
            return;
        }
        if (args.residual != nullptr) {
            const Columns columns = columns_of<T>(args.C, launch_.wide_out, out);
            const float zeros[V] = {};
            const int stride = members() * batches();
            for (int v = b * members() + member(); v < columns.vectors; v += stride)
                store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);
        }
        if (b == 0) fetch_batch(after, next);
    }

    // Where the residual is not aligned like the logits it is written by the element.
    CAMKD_DEVICE Columns columns_out(const Batch& batch) const {
        Columns columns = batch.columns;
        if (!launch_.wide_out) columns.whole = 0;
        return columns;
    }

    CAMKD_DEVICE void any_residuals(const RowInfo& info, const RowState& state, const Batch& batch, int b, char* out,
                                    const RowInfo& after, const Batch& next) const {
        const Columns columns = columns_out(batch);
        const float at_label = label_coefficient(launch_.args.formula, residual_scale());
        const int labelled = label_slot(info, b);
#pragma unroll 1
        for (int i = 0; i < batch.count; ++i) {
            if (i < batch.held) {
                float x[V];
                residual_vector<T>(stash(), batch, i, launch_.args.K, temperature(), state.references, state.sums,
                                   state.coefficients, i == labelled ? info.label_place : -1, at_label, x);
                store_vector<T>(out, launch_.args.streams[0].dtype, columns, batch.vector(i), x);
            }
            fetch_slot(after, next, i);
        }
    }

    CAMKD_DEVICE void known_residuals(const RowInfo& info, const RowState& state, const Batch& batch, int b, char* out,
                                      const RowInfo& after, const Batch& next) const {
        constexpr int K = Known;
        const Columns columns = columns_out(batch);
        const float at_label = label_coefficient(launch_.args.formula, residual_scale());
        const int labelled = label_slot(info, b);
        const KnownRow<K> row(state.references, state.coefficients);
        const char* addresses[K + 1];
#pragma unroll
        for (int k = 0; k <= K; ++k) addresses[k] = after.address[k];
#pragma unroll 1
        for (int i = 0; i < batch.count; ++i) {
            if (i < batch.held) {
                float x[V];
                known_residual<T, K>(stash(), batch.begin + i, temperature(), row,
                                     i == labelled ? info.label_place : -1, at_label, x);
                store_vector<T>(out, launch_.args.streams[0].dtype, columns, batch.vector(i), x);
            }
            if (i >= next.held) continue;
            if (whole_vector(next.columns, next.vector(i)))
                fetch_whole<T>(stash(), next, i, addresses, K);
            else
                fetch_elements<T>(stash(), next, i, launch_.args.streams, after.address, K);
        }
    }

    // The means, once the whole cluster has written its numbers; a warp each.
    CAMKD_DEVICE void add_up() {
        cluster_barrier(true);
        if (cluster_rank() != 0) return;
        for (int i = thread_id() / kWarp; i < 3; i += block_threads() / kWarp) {
            float sum = 0;
            for (int64_t n = lane(); n < launch_.args.N; n += kWarp)
                sum += launch_.args.numbers[i * launch_.args.N + n];
            sum = warp_sum(sum);
            if (lane() == 0) put_mean(launch_.args.mean, i, sum * of_batch()[0]);
        }
        if (thread_id() == 0) launch_.args.mean.others[2] = of_batch()[0];
    }

    const RowLaunch& launch_;
    const int rank_;     // of the block in its cluster
    int turns_ = 0;      // of the mailboxes
    int64_t ahead_ = 0;  // the label of this lane's row among those after the ones that are prepared
};

template <class T, bool WarpTeams, int Teachers>
CAMKD_KERNEL(kBlockThreads, blocks_per_multiprocessor(Teachers))
row_loss_kernel(CAMKD_PARAMETER RowLaunch launch) {
    RowKernel<T, WarpTeams, Teachers>(launch).run();
}

}  // namespace camkd::cuda
