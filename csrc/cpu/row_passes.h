// One row of the logit loss: reads its blocks of columns into scratch and sums, and writes the gradient from that
// scratch. row_loss.h distributes the rows, or the blocks of a row, over threads.
#pragma once

#include <algorithm>

#include "row_lanes.h"

namespace camkd::cpu {
namespace {

constexpr int kMaximaFirst = 6 * 1024;  // logits of a block, over all streams; with more, part of them leaves L1
constexpr int kPage = 4096, kBlocksAhead = 4;

// The scratch of one row: exponentials of K + 1 streams (K + 2 if e^s is kept too), and the reference maxima per block.
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

// One row of one call.
struct RowPasses {
    const RowLossArgs& args;
    const RowFunctions& functions;
    const Exps& exps;
    RowScratch scratch;
    const void* data[kMaxStreams];
    int64_t offset[kMaxStreams];
    int64_t index;
    RowLabels labels;

    RowPasses(const RowLossArgs& a, const RowFunctions& f, const Exps& x, RowScratch s, int64_t n)
        : args(a),
          functions(f),
          exps(x),
          scratch(s),
          index(n),
          labels(row_labels(a.target, a.second, n, a.C, a.formula.ignore_index)) {}

    bool ignored() const { return !labels.kept; }

    // Finds the row's logits; must come before read_block and store_sums.
    void locate() {
        const int64_t outer = index / args.S, inner = index - outer * args.S;
        auto find = [&](const Matrix& m, int k) {
            data[k] = m.data;
            offset[k] = outer * m.stride_outer + inner * m.stride_inner;
        };
        for (int k = 0; k <= args.K; ++k) find(args.streams[k], k);
    }
    // Address of column c of stream k.
    const char* address(int k, int64_t c) const {
        const DType dtype = args.streams[k].dtype;
        return static_cast<const char*>(data[k]) + (offset[k] + c) * (dtype == DType::f32 ? 4 : 2);
    }
    bool keeps_e1() const { return functions.power == 0; }

    // Prefetches from the pages kBlocksAhead. After other work has displaced the page tables from the caches, a page
    // walk takes as long as several blocks, and the prefetches of over_block would wait for it. Short rows do not repay
    // it, because many of them share a page.
    void prefetch_pages(int64_t c, int n) const {
        const int64_t bytes = int64_t(n) * (args.streams[0].dtype == DType::f32 ? 4 : 2);
        if (bytes < kPage / 4) return;
        for (int k = 0; k <= args.K; ++k)
            for (int64_t byte = 0; byte < bytes; byte += kPage)
                __builtin_prefetch(address(k, c) + kBlocksAhead * bytes + byte, 0, 2);
    }

    // Computes the exponentials of block b, their references and the sums of each stream. A reference is the maximum of
    // the block and of the stream before it, which `states` holds (null for the first block). Each stream prefetches
    // its next block, or the next row where rows are dense. Sums are reduced last, and the maxima of blocks that stay
    // in L1 are found first, so that no stream waits for the dependency chain of another one.
    void read_block(int64_t b, const State* states, float* student_d, BlockSums* sums) const {
        const int64_t c = b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, args.C - c));
        float* references = scratch.references + b * (args.K + 1);
        prefetch_pages(c, n);
        const bool maxima_first = n * (args.K + 1) <= kMaximaFirst;
        auto find_reference = [&](int k) {
            const float max = functions.max[k](data[k], offset[k] + c, n);
            references[k] = states ? std::max(states[k].max, max) : max;
        };
        for (int k = 0; maxima_first && k <= args.K; ++k) find_reference(k);
        // With no finite logit so far any reference will do, as every exponential is 0.
        auto finite = [](float max) { return max == -INFINITY ? 0.0f : max; };
        float* e1 = keeps_e1() ? scratch.stream(args.K + 1) + c : nullptr;
        LaneSums lanes[kMaxStreams];
        auto teacher = [&](RowFunctions::Teacher function, int k) {
            function(data[k], offset[k] + c, n, finite(references[k]), exps, address(k, c + n), student_d,
                     scratch.stream(k) + c, lanes[k]);
        };
        // Student first: the teachers need its distances
        if (!maxima_first) find_reference(0);
        functions.student(data[0], offset[0] + c, n, finite(references[0]), exps, address(0, c + n), student_d,
                          scratch.stream(0) + c, e1, lanes[0]);
        for (int k = 1; k <= args.K; ++k) {
            if (!maxima_first) find_reference(k);
            teacher(functions.teachers[k - 1], k);
        }
        // Reduce the lanes of all streams
        for (int k = 0; k <= args.K; ++k) {
            sums[k] = lanes[k].reduced(references[k]);
            if (sums[k].finite()) continue;
            teacher(functions.masked_teachers[k - 1], k);
            sums[k] = lanes[k].reduced(references[k]);
        }
    }

    // Adds block b to the states of the streams; their maxima become the references of the block.
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

    // The logit of stream k at the label minus this maximum.
    float label_distance(int k, float max) const {
        const float first = logit(args.streams[k], k, labels.first) - max;
        return labels.second < 0 ? first : mixed(labels.share, first, logit(args.streams[k], k, labels.second) - max);
    }

    // Stores the finished sums (State, or BlockSums of the only block) in one lane of `rows`.
    template <class Sums>
    void store_sums(const Sums* sums, LaneRows& rows, int lane) const {
        rows.kept[lane] = -1;
        rows.label_nan[lane] = labels.valid ? 0.0f : NAN;
        for (int k = 0; k <= args.K; ++k) {
            LaneRows::Stream& stream = rows.streams[k];
            stream.max[lane] = sums[k].max;
            stream.sumT[lane] = float(sums[k].sumT);
            stream.sum1[lane] = float(sums[k].sum1);
            stream.cross[lane] = float(sums[k].cross);
            stream.plogp[lane] = float(sums[k].plogp);
            stream.label[lane] = labels.valid ? label_distance(k, sums[k].max) : NAN;
        }
    }

    // Reads the whole row and stores its sums in one lane of `rows`.
    void read(int64_t blocks, float* student_d, LaneRows& rows, int lane) const {
        if (blocks == 1) {
            BlockSums sums[kMaxStreams];
            read_block(0, nullptr, student_d, sums);
            store_sums(sums, rows, lane);
            return;
        }
        State states[kMaxStreams];
        for (int64_t b = 0; b < blocks; ++b) add_block(b, states, student_d);
        store_sums(states, rows, lane);
    }

    // Writes block b of the gradient. The coefficients are relative to the maxima of the row, so they are multiplied by
    // the shift from the references of the block.
    void write_block(int64_t b, const LaneRows& rows, int lane, bool streaming) const {
        const int K = args.K;
        const int64_t c = b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, args.C - c));
        const float* references = scratch.references + b * (K + 1);
        const double inverseT = 1.0 / args.formula.temperature;
        Term terms[kMaxTeachers];
        int count = 0;
        for (int k = 0; k < K; ++k) {
            const float coefficient = rows.teacher[k][lane];
            // Weight 0 drops even a teacher whose logits are NaN.
            if (coefficient == 0) continue;
            double factor = shift_factor(references[k + 1], rows.streams[k + 1].max[lane], inverseT);
            terms[count++] = {float(coefficient * factor), scratch.stream(k + 1) + c};
        }
        const float* e = scratch.stream(0) + c;
        const float* e1 = keeps_e1() ? scratch.stream(K + 1) + c : e;
        const float max = rows.streams[0].max[lane];
        const float studentT = float(rows.studentT[lane] * shift_factor(references[0], max, inverseT));
        const float student1 = float(rows.student1[lane] * shift_factor(references[0], max, 1.0));
        functions.grad(e, e1, studentT, student1, terms, count, args.grad_student, index * args.C + c, n, streaming);
        // The label's column again, with the 1 of the one-hot label or the share of one of two
        auto write_label = [&](int64_t label, float share) {
            const int64_t y = label - c;
            if (y < 0 || y >= n) return;
            float e1_y = keeps_e1() ? e1[y] : e[y];
            for (int p = functions.power; p > 1; p /= 2) e1_y *= e1_y;
            // Soft and hard part separately: added to the label's 1, each of K small terms would be rounded to its
            // scale.
            float value = studentT * e[y];
            for (int k = 0; k < count; ++k) value -= terms[k].coefficient * terms[k].e[y];
            value += student1 * e1_y - label_coefficient(args.formula, args.grad_scale) * share;
            with_dtype(args.streams[0].dtype, [&](auto t) {
                store_tail(static_cast<decltype(t)*>(args.grad_student) + index * args.C + c + y, Vec::set(value), 1);
            });
        };
        if (!labels.valid) return;
        write_label(labels.first, labels.share);
        if (labels.second >= 0) write_label(labels.second, 1.0f - labels.share);
    }

    void clear_grad() const {
        const int64_t bytes = args.C * (args.streams[0].dtype == DType::f32 ? 4 : 2);
        std::memset(static_cast<char*>(args.grad_student) + index * bytes, 0, bytes);
    }
};

}  // namespace
}  // namespace camkd::cpu
