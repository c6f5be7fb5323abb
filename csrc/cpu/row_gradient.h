// The gradient of one row of the logit loss from the scratch that RowPasses has left, block by block.
#pragma once

#include "row_passes.h"

namespace camkd::cpu {
namespace {

// Writes one block of the gradient of one row.
struct GradientBlock {
    const RowPasses& row;
    const LaneRows& rows;
    const int lane;
    const int64_t b, c = b * kBlock;
    const int n = int(std::min<int64_t>(kBlock, row.args.C - c));
    const float* const references = row.scratch.references + b * (row.args.K + 1);
    const float* const e = row.scratch.stream(0) + c;
    const float* const e1 = row.scratch.at_one < 0 ? e : row.scratch.stream(row.scratch.at_one) + c;
    const float* const distances = row.scratch.distances < 0 ? nullptr : row.scratch.stream(row.scratch.distances) + c;
    float studentT, student1;
    Term terms[kMaxTeachers];
    int count = 0;

    // The coefficients are relative to the maxima of the row, so they are multiplied by the shift from the references
    // of the block; distances are shifted by a sum.
    GradientBlock(const RowPasses& passes, const LaneRows& lanes, int lane_of_row, int64_t block)
        : row(passes), rows(lanes), lane(lane_of_row), b(block) {
        const Formula& formula = row.args.formula;
        const double inverseT = 1.0 / formula.temperature;
        const float max = rows.streams[0].max[lane];
        studentT = float(rows.studentT[lane] * shift_factor(references[0], max, inverseT));
        student1 = float(rows.student1[lane] * shift_factor(references[0], max, 1.0));
        const bool forward = formula.divergence == Divergence::forward_kl;
        auto shift = [&](int k) {  // a block with no finite logit has a reference of 0
            return (references[k] == -INFINITY ? 0.0 : double(references[k])) - rows.streams[k].max[lane];
        };
        for (int k = 0; k < row.args.K; ++k) {
            const float coefficient = rows.teacher[k][lane];
            // Weight 0 drops even a teacher whose logits are NaN.
            if (coefficient == 0) continue;
            Term& term = terms[count++];
            term = {coefficient, row.scratch.stream(k + 1) + c, 0.0f};
            if (forward)
                term.coefficient *= shift_factor(references[k + 1], rows.streams[k + 1].max[lane], inverseT);
            else
                term.center = float(rows.center[k][lane] + (distances ? shift(k + 1) - shift(0) : 0.0));
        }
    }

    // `block`: memory for the gradient by logits that are not what the student's tensor holds.
    void write(const BlockScratch& block, bool streaming) const {
        const RowLossArgs& args = row.args;
        const DType dtype = args.streams[0].dtype;
        const int64_t at = row.index * args.C + c;
        if (!args.formula.maps) {
            write_to(args.grad_student, dtype, at, streaming);
            return;
        }
        write_to(block.mapped, DType::f32, 0, false);
        with_dtype(dtype, [&](auto t) {
            using T = decltype(t);
            map_gradient_block(static_cast<const T*>(row.data[0]) + row.offset[0] + c, block.mapped, n, row.map_of(0),
                               static_cast<T*>(args.grad_student) + at);
        });
    }

  private:
    // The gradient by the logits, into columns at .. at + n - 1.
    void write_to(void* out, DType dtype, int64_t at, bool streaming) const {
        const RowFunctions& functions = row.functions;
        if (row.args.formula.divergence == Divergence::forward_kl)
            functions.grad(e, e1, studentT, student1, terms, count, out, at, n, streaming);
        else
            functions.product_grad(e, e1, distances, studentT, student1, terms, count, out, at, n);
        if (!row.labels.valid) return;
        write_label(row.labels.first, row.labels.share, out, dtype, at);
        if (row.labels.second >= 0) write_label(row.labels.second, 1.0f - row.labels.share, out, dtype, at);
    }

    // The label's column again, with the 1 of the one-hot label or the share of one of two.
    void write_label(int64_t label, float share, void* out, DType dtype, int64_t at) const {
        const int64_t y = label - c;
        if (y < 0 || y >= n) return;
        float e1_y = e1[y];
        for (int p = row.functions.power; p > 1; p /= 2) e1_y *= e1_y;
        // Soft and hard part separately: added to the label's 1, each of K small terms would be rounded to its scale.
        float value = soft_part(y);
        value += student1 * e1_y - label_coefficient(row.args.formula, row.args.grad_scale) * share;
        with_dtype(dtype, [&](auto t) { store_tail(static_cast<decltype(t)*>(out) + at + y, Vec::set(value), 1); });
    }

    float soft_part(int64_t y) const {
        if (row.args.formula.divergence == Divergence::forward_kl) {
            float value = studentT * e[y];
            for (int k = 0; k < count; ++k) value -= terms[k].coefficient * terms[k].e[y];
            return value;
        }
        float soft = 0;
        for (int k = 0; k < count; ++k)
            soft +=
                terms[k].coefficient * ((distances ? distances[y] - terms[k].e[y] : terms[k].e[y]) - terms[k].center);
        return e[y] == 0 ? 0.0f : studentT * e[y] * soft;
    }
};

}  // namespace
}  // namespace camkd::cpu
