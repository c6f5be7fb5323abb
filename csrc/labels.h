// What the labels of a row are, on host and device. Conventions: camkd_fast/backends/reference.py.
#pragma once

#include "contract.h"

namespace camkd {

// A second label for every row, and the share of the first one. Null: rows have one label.
struct SecondLabels {
    const int64_t* target;  // (N)
    const float* mix;       // (N) in [0, 1]
};

// The labels of a row that count: one, or two different ones whose shares are above 0.
struct RowLabels {
    int64_t first, second;  // columns in [0, C) if `valid`; `second` is -1 if there is none
    float share;            // of `first`; 1 if there is no second label
    bool kept, valid;       // not ignored; no label and no share is out of range

    CAMKD_HD_MEMBER RowLabels of_one(int64_t target, int64_t C, int64_t ignore_index) {
        return {target, -1, 1.0f, target != ignore_index, target >= 0 && target < C};
    }
    CAMKD_HD_MEMBER RowLabels of_two(int64_t target, int64_t second, float mix, int64_t C, int64_t ignore_index) {
        RowLabels labels = of_one(target, C, ignore_index);
        labels.valid = labels.valid && second >= 0 && second < C && second != ignore_index && mix >= 0 && mix <= 1;
        if (mix == 0) {
            labels.first = second;
        } else if (mix != 1 && second != target) {
            labels.second = second;
            labels.share = mix;
        }
        return labels;
    }
};

// Of row n. The second label and the share of an ignored row are not read.
CAMKD_HD RowLabels row_labels(const int64_t* target, const SecondLabels& second, int64_t n, int64_t C,
                              int64_t ignore_index) {
    if (!second.target || target[n] == ignore_index) return RowLabels::of_one(target[n], C, ignore_index);
    return RowLabels::of_two(target[n], second.target[n], second.mix[n], C, ignore_index);
}

// The average of a number at both labels, given the share of the first. Of distances rather than logits, because a
// large common offset of a row would cost accuracy.
CAMKD_HD float mixed(float share, float first, float second) {
    return share * first + (1.0f - share) * second;
}

}  // namespace camkd
