// One row of the logit loss: reads its blocks of columns into scratch and sums. row_gradient.h writes the gradient from
// that scratch, and row_loss.h distributes the rows, or the blocks of a row, over threads.
#pragma once

#include <algorithm>
#include <utility>

#include "row_lanes.h"
#include "row_maps.h"
#include "row_scratch.h"

namespace camkd::cpu {
namespace {

constexpr int kMaximaFirst = 6 * 1024;  // logits of a block, over all streams; with more, part of them leaves L1
constexpr int kPage = 4096, kBlocksAhead = 4;

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
    const LogitMap& map_of(int k) const { return args.formula.logit_maps[k]; }

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
    void read_block(int64_t b, const State* states, const BlockScratch& block, BlockSums* sums) const {
        const int64_t c = b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, args.C - c));
        float* references = scratch.references + b * (args.K + 1);
        prefetch_pages(c, n);
        const bool maxima_first = n * (args.K + 1) <= kMaximaFirst;
        auto find_reference = [&](int k) {
            float max = functions.max[k](data[k], offset[k] + c, n);
            if (args.formula.maps) max = mapped(k, max);
            references[k] = states ? std::max(states[k].max, max) : max;
        };
        for (int k = 0; maxima_first && k <= args.K; ++k) find_reference(k);
        // With no finite logit so far any reference will do, as every exponential is 0.
        auto finite = [](float max) { return max == -INFINITY ? 0.0f : max; };
        float* const e = scratch.stream(0) + c;
        float* const e1 = scratch.at_one < 0 ? nullptr : scratch.stream(scratch.at_one) + c;
        float* const distances = scratch.distances < 0 ? block.distances : scratch.stream(scratch.distances) + c;
        LaneSums lanes[kMaxStreams];
        auto teacher = [&](RowFunctions::Teacher function, int k) {
            const auto [logits, at] = logits_of(k, c, n, block);
            function(logits, at, n, finite(references[k]), exps, address(k, c + n), distances, e, scratch.stream(k) + c,
                     lanes[k]);
        };
        // Student first: the teachers need its distances
        if (!maxima_first) find_reference(0);
        const auto [logits, at] = logits_of(0, c, n, block);
        functions.student(logits, at, n, finite(references[0]), exps, address(0, c + n), distances, e, e1, lanes[0]);
        for (int k = 1; k <= args.K; ++k) {
            if (!maxima_first) find_reference(k);
            teacher(functions.teachers[k - 1], k);
        }
        // Reduce the lanes of all streams
        for (int k = 0; k <= args.K; ++k) {
            sums[k] = lanes[k].reduced(references[k]);
            if (k == 0 || sums[k].finite()) continue;
            teacher(functions.masked_teachers[k - 1], k);
            sums[k] = lanes[k].reduced(references[k]);
        }
    }

    // Adds block b to the states of the streams; their maxima become the references of the block.
    void add_block(int64_t b, State* states, const BlockScratch& block) const {
        BlockSums sums[kMaxStreams];
        read_block(b, states, block, sums);
        move_states(args.formula, states, scratch.references + b * (args.K + 1), args.K,
                    1.0 / args.formula.temperature);
        for (int k = 0; k <= args.K; ++k) sums[k].add_to(states[k]);
    }

    // Columns c .. c + n - 1 of stream k as the passes read them, and the column at which they begin.
    std::pair<const void*, int64_t> logits_of(int k, int64_t c, int n, const BlockScratch& block) const {
        if (!args.formula.maps) return {data[k], offset[k] + c};
        return mapped_logits(k, c, n, block);
    }
    // Out of line, because most calls have no maps and short rows would take the time of their branches.
    __attribute__((noinline)) std::pair<const void*, int64_t> mapped_logits(int k, int64_t c, int n,
                                                                            const BlockScratch& block) const {
        with_dtype(args.streams[k].dtype, [&](auto t) {
            map_block(static_cast<const decltype(t)*>(data[k]) + offset[k] + c, n, map_of(k), block.mapped);
        });
        return {block.mapped, 0};
    }

    __attribute__((noinline)) float mapped(int k, float x) const { return VecMap(map_of(k)).of(x); }
    float logit(int k, int64_t c) const {
        const float x = with_dtype(args.streams[k].dtype, [&](auto t) {
            return load_one(static_cast<const decltype(t)*>(data[k]) + offset[k] + c);
        });
        return args.formula.maps ? mapped(k, x) : x;
    }

    // The logit of stream k at the label minus this maximum.
    float label_distance(int k, float max) const {
        const float first = logit(k, labels.first) - max;
        return labels.second < 0 ? first : mixed(labels.share, first, logit(k, labels.second) - max);
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
        if (args.shard != Shard::none) finish_shard(rows, lane);
    }

    // Takes the sums of the whole row if they are given. Out of line: most calls have whole rows.
    __attribute__((noinline)) void finish_shard(LaneRows& rows, int lane) const {
        if (args.shard != Shard::sums) return rows.read_sums(args, index, lane);
        for (int k = 0; labels.valid && k <= args.K; ++k) {
            LaneRows::Stream& stream = rows.streams[k];
            // Without a finite logit here the label's is -inf, which minus the maximum is NaN
            if (stream.max[lane] == -INFINITY) stream.label[lane] = logit(k, labels.first);
        }
    }

    // Reads the whole row and stores its sums in one lane of `rows`.
    void read(int64_t blocks, const BlockScratch& block, LaneRows& rows, int lane) const {
        if (blocks == 1) {
            BlockSums sums[kMaxStreams];
            read_block(0, nullptr, block, sums);
            store_sums(sums, rows, lane);
        } else {
            State states[kMaxStreams];
            for (int64_t b = 0; b < blocks; ++b) add_block(b, states, block);
            store_sums(states, rows, lane);
        }
        if (!is_mixture(args.formula) || args.shard == Shard::sums) return;
        MixedSums sums[kMaxTeachers];
        for (int64_t b = 0; b < blocks; ++b) mix_block(b, rows, lane, sums);
        store_mixed(sums, rows, lane);
    }

    // For jsd and skew: adds block b to the sums over the mixtures, and leaves g in scratch. Needs the sums of the row.
    void mix_block(int64_t b, const LaneRows& rows, int lane, MixedSums* sums) const {
        const int64_t c = b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, args.C - c));
        const float* references = scratch.references + b * (args.K + 1);
        auto probability = [&](int k) {
            const LaneRows::Stream& stream = rows.streams[k];
            const double factor = shift_factor(references[k], stream.max[lane], 1.0 / args.formula.temperature);
            return float(factor / stream.sumT[lane]);
        };
        const auto mix = args.formula.divergence == Divergence::jsd ? mixed_block<true> : mixed_block<false>;
        for (int k = 1; k <= args.K; ++k)
            mix(scratch.stream(0) + c, probability(0), probability(k), args.formula, n, scratch.stream(k) + c,
                sums[k - 1]);
    }

    void store_mixed(const MixedSums* sums, LaneRows& rows, int lane) const {
        if (args.shard == Shard::results) return;  // those of the whole row are given
        for (int k = 0; k < args.K; ++k) {
            rows.streams[k + 1].cross[lane] = float(sums[k].divergence);
            rows.streams[k + 1].center[lane] = float(sums[k].center);
        }
    }

    void clear_grad() const {
        const int64_t bytes = args.C * (args.streams[0].dtype == DType::f32 ? 4 : 2);
        std::memset(static_cast<char*>(args.grad_student) + index * bytes, 0, bytes);
    }
};

}  // namespace
}  // namespace camkd::cpu
