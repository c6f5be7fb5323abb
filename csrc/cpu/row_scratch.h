// Memory that the passes over a row leave numbers in for each other.
#pragma once

#include "row_functions.h"

namespace camkd::cpu {
namespace {

// The scratch of one row: a number per column and stream, and the reference maxima per block. Streams are the
// exponentials of student and teachers, the student's at temperature 1 if they are no power of those (Power 0), and the
// student's distances for the reverse KL. Of a teacher there are distances for the reverse KL in the place of
// exponentials, and g for jsd and skew once its exponentials have been used (camkd_fast/backends/divergences.py).
struct RowScratch {
    float* numbers;     // [stream][padded]
    float* references;  // [block][K + 1]
    int64_t padded;
    int at_one, distances;  // streams, or -1

    static int streams(const RowLossArgs& args, const RowFunctions& functions) {
        return args.K + 1 + keeps_at_one(functions) + keeps_distances(args);
    }
    static int64_t floats(const RowLossArgs& args, const RowFunctions& functions, int64_t blocks) {
        const int count = streams(args, functions);
        return count * pad(args.C) + blocks * count;
    }
    RowScratch(float* memory, const RowLossArgs& args, const RowFunctions& functions)
        : numbers(memory),
          references(memory + streams(args, functions) * pad(args.C)),
          padded(pad(args.C)),
          at_one(keeps_at_one(functions) ? args.K + 1 : -1),
          distances(keeps_distances(args) ? args.K + 1 + keeps_at_one(functions) : -1) {}
    float* stream(int k) const { return numbers + k * padded; }
    // The scratch of another row of the call, which lies so many floats further on.
    RowScratch moved(int64_t floats) const {
        RowScratch other = *this;
        other.numbers += floats;
        other.references += floats;
        return other;
    }

  private:
    static int64_t pad(int64_t C) { return (C + 2 * Vec::width + 15) / 16 * 16; }
    static bool keeps_at_one(const RowFunctions& functions) { return functions.power == 0; }
    static bool keeps_distances(const RowLossArgs& args) { return args.formula.divergence == Divergence::reverse_kl; }
};

// The scratch of one thread for the block that it works on.
struct BlockScratch {
    float* distances;  // of the student
    float* mapped;     // logits of a LogitMap; later the gradient by them

    static constexpr int64_t kPadded = kBlock + 2 * Vec::width;
    static int64_t floats(const RowLossArgs& args) { return args.formula.maps ? 2 * kPadded : kPadded; }
    explicit BlockScratch(float* memory) : distances(memory), mapped(memory + kPadded) {}
};

}  // namespace
}  // namespace camkd::cpu
