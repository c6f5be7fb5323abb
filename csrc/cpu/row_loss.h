// The logit loss on a CPU: one read of the K+1 rows leaves their exponentials in scratch, one pass over the scratch
// writes the residual. Rows run in parallel; when there are few of them and they are wide, columns do.
#pragma once

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>

#include "row_lanes.h"

namespace camkd::cpu {
namespace {

constexpr int64_t kRowScratch = 4 * 1024 * 1024;  // bytes; wider rows are shared by all threads
constexpr int64_t kGroupScratch = 128 * 1024;     // bytes of rows that finish together: near, in L2
constexpr int kMaximaFirst = 6 * 1024;            // logits of a block; more of them leave L1 in between
constexpr int kPage = 4096, kBlocksAhead = 4;
constexpr int64_t kStreamingBytes = 4 * 1024 * 1024;  // residuals beyond this do not stay in the cache anyway

// Scratch floats that survive from call to call, so that a step does not fault in fresh pages.
class Scratch {
  public:
    ~Scratch() { release(); }
    float* reserve(int64_t floats) {
        if (floats > capacity_) {
            release();
            data_ = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
            capacity_ = floats;
        }
        return data_;
    }

  private:
    void release() {
        if (data_) ::operator delete(data_, std::align_val_t(64));
    }
    float* data_ = nullptr;
    int64_t capacity_ = 0;
};

// Where the exponentials of one row lie: K+1 streams (K+2 when e^s is kept too), and each block's reference maxima.
struct RowScratch {
    float* e;           // [stream][padded]
    float* references;  // [block][stream]
    int64_t padded;

    static int64_t pad(int64_t C) { return (C + 2 * Vec::width + 15) / 16 * 16; }
    static int64_t floats(int64_t C, int streams, int64_t blocks) { return streams * pad(C) + blocks * streams; }
    RowScratch(float* memory, int64_t C, int streams)
        : e(memory), references(memory + streams * pad(C)), padded(pad(C)) {}
    float* stream(int k) const { return e + k * padded; }
};

// One row of one call: pointers and the passes over its blocks.
struct Row {
    const RowLossArgs& args;
    const RowFunctions& functions;
    const Exps& exps;
    RowScratch scratch;
    const void* data[kMaxStreams];
    int64_t offset[kMaxStreams];
    int64_t index;

    Row(const RowLossArgs& a, const RowFunctions& f, const Exps& x, RowScratch s, int64_t n)
        : args(a), functions(f), exps(x), scratch(s), index(n) {}

    bool ignored() const { return args.target[index] == args.formula.ignore_index; }

    // Finds the row's logits, which read_block and put need.
    void start() {
        const int64_t outer = index / args.S, inner = index - outer * args.S;
        auto locate = [&](const Matrix& m, int k) {
            data[k] = m.data;
            offset[k] = outer * m.stride_outer + inner * m.stride_inner;
        };
        for (int k = 0; k <= args.K; ++k) locate(args.streams[k], k);
    }
    // Where stream k's columns from c on lie in memory.
    const char* address(int k, int64_t c) const {
        const DType dtype = args.streams[k].dtype;
        return static_cast<const char*>(data[k]) + (offset[k] + c) * (dtype == DType::f32 ? 4 : 2);
    }
    bool keeps_e1() const { return functions.power == 0; }

    // Touches the pages kBlocksAhead: a walk of the page tables takes as long as several blocks once other work has
    // displaced them, and what is prefetched by the line (over_block) would wait for it. Not worth it in short rows, of
    // which many share a page.
    void reach_ahead(int64_t c, int n) const {
        const int64_t bytes = int64_t(n) * (args.streams[0].dtype == DType::f32 ? 4 : 2);
        if (bytes < kPage / 4) return;
        for (int k = 0; k <= args.K; ++k)
            for (int64_t byte = 0; byte < bytes; byte += kPage)
                __builtin_prefetch(address(k, c) + kBlocksAhead * bytes + byte, 0, 2);
    }

    // Leaves the exponentials of block b, their references and, by stream, their sums. A reference is the block's
    // maximum or the stream's before it, found in `states` unless this is the first block. Each stream prefetches what
    // it needs a round later: its next block, or the row behind this one where rows are dense. All sums are added up
    // last, and the maxima of blocks that stay in L1 found first, so that no stream waits for another's chain of
    // instructions.
    void read_block(int64_t b, const State* states, float* student_d, BlockSums* sums) const {
        const int64_t c = b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, args.C - c));
        float* references = scratch.references + b * (args.K + 1);
        reach_ahead(c, n);
        const bool maxima_first = n * (args.K + 1) <= kMaximaFirst;
        auto find_reference = [&](int k) {
            const float max = functions.max[k](data[k], offset[k] + c, n);
            references[k] = states ? std::max(states[k].max, max) : max;
        };
        for (int k = 0; maxima_first && k <= args.K; ++k) find_reference(k);
        // With no finite logit yet any reference will do: every exponential is 0.
        auto finite = [](float max) { return max == -INFINITY ? 0.0f : max; };
        float* e1 = keeps_e1() ? scratch.stream(args.K + 1) + c : nullptr;
        LaneSums lanes[kMaxStreams];
        auto teacher = [&](RowFunctions::Teacher function, int k) {
            function(data[k], offset[k] + c, n, finite(references[k]), exps, address(k, c + n), student_d,
                     scratch.stream(k) + c, lanes[k]);
        };
        if (!maxima_first) find_reference(0);
        functions.student(data[0], offset[0] + c, n, finite(references[0]), exps, address(0, c + n), student_d,
                          scratch.stream(0) + c, e1, lanes[0]);
        for (int k = 1; k <= args.K; ++k) {
            if (!maxima_first) find_reference(k);
            teacher(functions.teachers[k - 1], k);
        }
        for (int k = 0; k <= args.K; ++k) {
            sums[k] = lanes[k].added_up(references[k]);
            if (sums[k].finite()) continue;
            teacher(functions.masked_teachers[k - 1], k);
            sums[k] = lanes[k].added_up(references[k]);
        }
    }

    // Adds block b to the states of the streams, whose maxima move to the block's references.
    void add_block(int64_t b, State* states, float* student_d) const {
        BlockSums sums[kMaxStreams];
        read_block(b, states, student_d, sums);
        const float* references = scratch.references + b * (args.K + 1);
        const double inverseT = 1.0 / args.formula.temperature;
        const float old_student = states[0].max;
        move_student(states[0], references[0], inverseT);
        for (int k = 0; k <= args.K; ++k) {
            if (k > 0) move_teacher(states[k], references[k], old_student, references[0], inverseT);
            sums[k].add_to(states[k]);
        }
    }

    float logit(const Matrix& matrix, int k, int64_t c) const {
        return with_dtype(matrix.dtype,
                          [&](auto t) { return load_one(static_cast<const decltype(t)*>(data[k]) + offset[k] + c); });
    }

    bool label_fits() const { return args.target[index] >= 0 && args.target[index] < args.C; }

    // The row's finished sums, states or those of its only block, as one lane of `rows`.
    template <class Sums>
    void put(const Sums* sums, Lanes& rows, int lane) const {
        const bool fits = label_fits();
        rows.kept[lane] = -1;
        rows.label_nan[lane] = fits ? 0.0f : NAN;
        for (int k = 0; k <= args.K; ++k) {
            Lanes::Stream& stream = rows.streams[k];
            stream.max[lane] = sums[k].max;
            stream.sumT[lane] = float(sums[k].sumT);
            stream.sum1[lane] = float(sums[k].sum1);
            stream.cross[lane] = float(sums[k].cross);
            stream.plogp[lane] = float(sums[k].plogp);
            stream.label[lane] = fits ? logit(args.streams[k], k, args.target[index]) : NAN;
        }
    }

    // Reads the whole row into one lane of `rows`.
    void read(int64_t blocks, float* student_d, Lanes& rows, int lane) const {
        if (blocks == 1) {
            BlockSums sums[kMaxStreams];
            read_block(0, nullptr, student_d, sums);
            put(sums, rows, lane);
            return;
        }
        State states[kMaxStreams];
        for (int64_t b = 0; b < blocks; ++b) add_block(b, states, student_d);
        put(states, rows, lane);
    }

    void write_block(int64_t b, const Lanes& rows, int lane, bool streaming) const {
        const int K = args.K;
        const int64_t c = b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, args.C - c));
        const float* references = scratch.references + b * (K + 1);
        const double inverseT = 1.0 / args.formula.temperature;
        Term terms[kMaxTeachers];
        int count = 0;
        for (int k = 0; k < K; ++k) {
            const float coefficient = rows.teacher[k][lane];
            // Weight 0 drops the teacher, even one whose logits are NaN.
            if (coefficient == 0) continue;
            double factor = shift_factor(references[k + 1], rows.streams[k + 1].max[lane], inverseT);
            terms[count++] = {float(coefficient * factor), scratch.stream(k + 1) + c};
        }
        const float* e = scratch.stream(0) + c;
        const float* e1 = keeps_e1() ? scratch.stream(K + 1) + c : e;
        const float max = rows.streams[0].max[lane];
        const float at = float(rows.studentT[lane] * shift_factor(references[0], max, inverseT));
        const float a1 = float(rows.student1[lane] * shift_factor(references[0], max, 1.0));
        functions.grad(e, e1, at, a1, terms, count, args.grad_student, index * args.C + c, n, streaming);
        const int64_t y = args.target[index] - c;
        if (label_fits() && y >= 0 && y < n) {
            float e1_y = keeps_e1() ? e1[y] : e[y];
            for (int p = functions.power; p > 1; p /= 2) e1_y *= e1_y;
            // The two differences apart: beside a label's 1 each of K small terms would be rounded to its scale.
            float value = at * e[y];
            for (int k = 0; k < count; ++k) value -= terms[k].coefficient * terms[k].e[y];
            value += a1 * e1_y - label_coefficient(args.formula, args.grad_scale);
            with_dtype(args.streams[0].dtype, [&](auto t) {
                store_tail(static_cast<decltype(t)*>(args.grad_student) + index * args.C + c + y, Vec::set(value), 1);
            });
        }
    }

    void clear_grad() const {
        const int64_t bytes = args.C * (args.streams[0].dtype == DType::f32 ? 4 : 2);
        std::memset(static_cast<char*>(args.grad_student) + index * bytes, 0, bytes);
    }
};

inline int64_t block_count(int64_t C) {
    return (C + kBlock - 1) / kBlock;
}

// How many rows finish together: as many as there are lanes, while their scratch stays near and every thread has some.
inline int rows_per_group(int64_t N, int64_t row_bytes, int threads) {
    const int64_t near = std::max<int64_t>(1, kGroupScratch / row_bytes), each = (N + threads - 1) / threads;
    return int(std::min<int64_t>({Vec::width, near, std::max<int64_t>(each, 1)}));
}

inline void rows_in_parallel(const RowLossArgs& args, const RowFunctions& functions, const Exps& exps, int threads,
                             bool streaming) {
    const int64_t blocks = block_count(args.C);
    const int streams = args.K + 1 + (functions.power == 0 ? 1 : 0);
    const int64_t row_floats = RowScratch::floats(args.C, streams, blocks);
    const int group = rows_per_group(args.N, row_floats * int64_t(sizeof(float)), threads);
    const int64_t groups = (args.N + group - 1) / group;
    const int64_t chunk = std::max<int64_t>(1, groups / (threads * 8));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local Scratch memory;
        float* base = memory.reserve(group * row_floats + kBlock + 2 * Vec::width);
        float* student_d = base + group * row_floats;
        Lanes rows;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = g * group;
            const int count = int(std::min<int64_t>(group, args.N - begin));
            rows.reset(args.K);
            auto at = [&](int lane) {
                return Row(args, functions, exps, RowScratch(base + lane * row_floats, args.C, streams), begin + lane);
            };
            for (int lane = 0; lane < count; ++lane) {
                Row row = at(lane);
                if (row.ignored()) continue;
                row.start();
                row.read(blocks, student_d, rows, lane);
            }
            rows.finish(args, begin, count);
            for (int lane = 0; args.grad_student && lane < count; ++lane) {
                const Row row = at(lane);
                if (row.ignored())
                    row.clear_grad();
                else
                    for (int64_t b = 0; b < blocks; ++b) row.write_block(b, rows, lane, streaming);
            }
        }
    }
}

// All threads share a row: each takes a contiguous range of its blocks, the partial states are merged in order.
inline void columns_in_parallel(const RowLossArgs& args, const RowFunctions& functions, const Exps& exps, int threads,
                                bool streaming) {
    const int64_t blocks = block_count(args.C);
    const int streams = args.K + 1 + (functions.power == 0 ? 1 : 0);
    threads = int(std::min<int64_t>(threads, blocks));
    const int64_t row_floats = RowScratch::floats(args.C, streams, blocks);
    Scratch memory;
    float* base = memory.reserve(row_floats + threads * (kBlock + 2 * Vec::width));
    const double inverseT = 1.0 / args.formula.temperature;
    std::unique_ptr<State[]> partial(new State[threads * kMaxStreams]);
    Lanes shared;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = blocks * me / team, end = blocks * (me + 1) / team;
        float* student_d = base + row_floats + me * (kBlock + 2 * Vec::width);
        State* mine = partial.get() + me * kMaxStreams;
        for (int64_t n = 0; n < args.N; ++n) {
            Row row(args, functions, exps, RowScratch(base, args.C, streams), n);
            const bool ignored = row.ignored();
            if (!ignored) {
                row.start();
                for (int k = 0; k <= args.K; ++k) mine[k] = State();
                for (int64_t b = begin; b < end; ++b) row.add_block(b, mine, student_d);
            }
#pragma omp barrier
#pragma omp single
            {
                shared.reset(args.K);
                if (!ignored) {
                    for (int t = 1; t < team; ++t)
                        merge_states(partial.get(), partial.get() + t * kMaxStreams, args.K, inverseT);
                    row.put(partial.get(), shared, 0);
                }
                shared.finish(args, n, 1);
                if (ignored && args.grad_student) row.clear_grad();
            }
            if (args.grad_student && !ignored)
                for (int64_t b = begin; b < end; ++b) row.write_block(b, shared, 0, streaming);
#pragma omp barrier
        }
    }
}

void row_loss(const RowLossArgs& args, int max_threads) {
    const RowFunctions functions = choose_functions(args);
    const Exps exps{Exp(1.0f / args.formula.temperature), Exp(1.0f)};
    const int threads = useful_threads(args.N * args.C * (args.K + 1), max_threads);
    const int64_t scratch = (args.K + 2) * args.C * int64_t(sizeof(float));
    const int64_t bytes = args.N * args.C * (args.streams[0].dtype == DType::f32 ? 4 : 2);
    const bool streaming = bytes > kStreamingBytes;
    if (threads > 1 && (args.N < threads || scratch > kRowScratch)) {
        columns_in_parallel(args, functions, exps, threads, streaming);
    } else {
        rows_in_parallel(args, functions, exps, threads, streaming);
    }
}

}  // namespace
}  // namespace camkd::cpu
