// The three passes over one block of columns: maximum, statistics, gradient. row_passes.h combines the blocks of a row.
// `Power`: e^x = (e^{x/T})^Power for T = 1, 2, 4; Power 0 is any other T, at the cost of a second exponential per
// element.
#pragma once

#include <type_traits>

#include "vec_math.h"

namespace camkd::cpu {
namespace {

// Columns per block: the d and e blocks of a stream (2 x 8 KB) and its input stay in a 32 KB L1.
constexpr int kBlock = 2048;

template <int Power>
inline Vec power(Vec e) {
    if constexpr (Power == 2) return e * e;
    if constexpr (Power == 4) {
        Vec square = e * e;
        return square * square;
    }
    return e;
}

// sum + e^Power; the last multiplication is fused with the addition.
template <int Power>
inline Vec add_power(Vec sum, Vec e) {
    if constexpr (Power == 4) e = e * e;
    return Power == 1 ? sum + e : Vec::fma(e, e, sum);
}

template <class T>
float block_max(const T* x, int n) {
    constexpr int W = Vec::width;
    if (n < W) return load_tail(x, n, -INFINITY).max();
    Vec a = Vec::set(-INFINITY), b = a, c = a, d = a;
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        a = Vec::max(load(x + i), a);
        b = Vec::max(load(x + i + W), b);
        c = Vec::max(load(x + i + 2 * W), c);
        d = Vec::max(load(x + i + 3 * W), d);
    }
    for (; i + W <= n; i += W) a = Vec::max(load(x + i), a);
    b = Vec::max(load(x + n - W), b);
    return Vec::max(Vec::max(a, b), Vec::max(c, d)).max();
}

// Calls step(x, i, lane, counts) over a block of n columns: x holds neighbouring vectors from offset i on, and vector j
// adds to accumulator (lane + j) % 2 of two. The last vector overlaps its predecessor: `counts` masks the columns that
// are already summed, while stores repeat the same values. The stream's `next` block is prefetched to L2: K + 1 blocks
// would not fit L1, and prefetching only the block that is read next would be too late.
template <class T, class Step>
inline void over_block(const T* x, int n, const char* next, Step step) {
    constexpr int W = Vec::width;
    constexpr auto all = [](Vec v) { return v; };
    int i = 0;
    auto run_by = [&](auto count) {
        constexpr int Count = decltype(count)::value;
        for (; i + Count * W <= n; i += Count * W) {
            for (int byte = 0; Count > 1 && byte < Count * W * int(sizeof(T)); byte += 64)
                __builtin_prefetch(next + i * sizeof(T) + byte, 0, 2);
            Vec v[Count];
            each<Count>([&](int j) { v[j] = load(x + i + j * W); });
            step(v, i, 0, all);
        }
    };
    if constexpr (Vec::unroll > 2) run_by(std::integral_constant<int, Vec::unroll>{});
    run_by(std::integral_constant<int, 2>{});
    run_by(std::integral_constant<int, 1>{});
    if (i == n) return;
    Vec last[1];
    if (n < W) {
        // Columns beyond the end repeat the first logit, so that they bring in no infinities of their own.
        const Vec mask = first_lanes(n);
        last[0] = load_tail(x, n, load_one(x));
        step(last, 0, 1, [mask](Vec v) { return Vec::bit_and(v, mask); });
    } else {
        const Vec mask = last_lanes(n - i);
        last[0] = load(x + n - W);
        step(last, n - W, 1, [mask](Vec v) { return Vec::bit_and(v, mask); });
    }
}

// Sums within a block are float; sums over the blocks of a row are double.
using State = StreamState<double>;

// The sums over one block of one stream, relative to the block's references; `max` is this stream's reference.
struct BlockSums {
    float max, sumT, sum1, cross, plogp;

    // False if a product 0 * inf has made a sum NaN, or a sum is infinite.
    bool finite() const { return std::isfinite(cross) && std::isfinite(plogp); }
    void add_to(State& state) const {
        state.sumT += sumT;
        state.sum1 += sum1;
        state.cross += cross;
        state.plogp += plogp;
    }
};

// The sums over one block of one stream before the horizontal reduction. A row reduces those of all its streams
// together, because a single reduction is a serial dependency chain.
struct LaneSums {
    Vec sumT, sum1, cross, plogp;

    BlockSums reduced(float reference) const {
        float sums[4];
        Vec::sum_each(sumT, sum1, cross, plogp, sums);
        return {reference, sums[0], sums[1], sums[2], sums[3]};
    }
};

struct Exps {
    Exp atT, at1;
};

// Stores d = s - reference and e = e^{d/T} (and e1 = e^d if Power is 0), each n long and at least one vector. `Entropy`
// sums e d as `plogp`, columns of probability 0 counting 0.
// Flattened, like teacher_block: if any call were left, the accumulators would live in memory.
template <class T, int Power, bool Entropy>
__attribute__((flatten)) void student_block(const T* s, int n, float reference, const Exps& exponentials,
                                            const char* next, float* d_out, float* e_out, float* e1_out,
                                            LaneSums& sums) {
    const Exps exps = exponentials;
    const Vec ref = Vec::set(reference);
    Vec sumT[2] = {Vec::zero(), Vec::zero()}, sum1[2] = {Vec::zero(), Vec::zero()};
    Vec plogp[2] = {Vec::zero(), Vec::zero()};
    over_block(s, n, next, [&](auto& x, int i, int lane, auto counts) {
        constexpr int Count = std::extent_v<std::remove_reference_t<decltype(x)>>;
        Vec d[Count], e[Count], e1[Count];
        each<Count>([&](int j) { d[j] = x[j] - ref; });
        exps.atT(d, e);
        if constexpr (Power == 0) exps.at1(d, e1);
        each<Count>([&](int j) {
            const int at = i + j * Vec::width, l = (lane + j) % 2;
            d[j].store(d_out + at);
            e[j].store(e_out + at);
            const Vec counted = counts(e[j]);
            sumT[l] = sumT[l] + counted;
            if constexpr (Entropy) plogp[l] = Vec::fma(counted, Vec::zero_where_zero(d[j], counted), plogp[l]);
            if constexpr (Power == 0) {
                e1[j].store(e1_out + at);
                sum1[l] = sum1[l] + counts(e1[j]);
            } else if constexpr (Power != 1) {
                sum1[l] = add_power<Power>(sum1[l], counted);
            }
        });
    });
    const Vec total = sumT[0] + sumT[1];
    sums = {total, Power == 1 ? total : sum1[0] + sum1[1], Vec::zero(), plogp[0] + plogp[1]};
}

// `Masked` counts columns of probability 0 as 0, where the product would be 0 * inf. -inf logits are rare, so only a
// block whose unmasked sums are not finite is read again with it.
template <class T, int Power, bool Entropy, bool Masked>
__attribute__((flatten)) void teacher_block(const T* z, int n, float reference, const Exps& exponentials,
                                            const char* next, const float* student_d, float* e_out, LaneSums& sums) {
    const Exps exps = exponentials;
    const Vec ref = Vec::set(reference);
    Vec sumT[2] = {Vec::zero(), Vec::zero()}, sum1[2] = {Vec::zero(), Vec::zero()};
    Vec cross[2] = {Vec::zero(), Vec::zero()}, plogp[2] = {Vec::zero(), Vec::zero()};
    over_block(z, n, next, [&](auto& x, int i, int lane, auto counts) {
        constexpr int Count = std::extent_v<std::remove_reference_t<decltype(x)>>;
        Vec d[Count], e[Count], e1[Count];
        each<Count>([&](int j) { d[j] = x[j] - ref; });
        exps.atT(d, e);
        if constexpr (Power == 0) exps.at1(d, e1);
        each<Count>([&](int j) {
            const int at = i + j * Vec::width, l = (lane + j) % 2;
            Vec difference = d[j] - Vec::load(student_d + at);
            e[j].store(e_out + at);
            const Vec counted = counts(e[j]);
            // After `counts`, because a masked column may be infinite too
            if constexpr (Masked) difference = Vec::zero_where_zero(difference, counted);
            sumT[l] = sumT[l] + counted;
            cross[l] = Vec::fma(counted, difference, cross[l]);
            if constexpr (Power == 0 || Entropy) {
                const Vec at1 = Power == 0 ? counts(e1[j]) : power<Power>(counted);
                sum1[l] = sum1[l] + at1;
                if constexpr (Entropy)
                    plogp[l] = Vec::fma(at1, Masked ? Vec::zero_where_zero(d[j], at1) : d[j], plogp[l]);
            } else if constexpr (Power != 1) {
                sum1[l] = add_power<Power>(sum1[l], counted);
            }
        });
    });
    const Vec total = sumT[0] + sumT[1];
    sums = {total, Power == 1 ? total : sum1[0] + sum1[1], cross[0] + cross[1], plogp[0] + plogp[1]};
}

// teacher_block for the reverse KL: stores the distances d_z, and sums e_s (d_s - d_z) as `cross`. Columns in which the
// student's probability is 0 count 0.
template <class T, int Power, bool Entropy>
__attribute__((flatten)) void reverse_block(const T* z, int n, float reference, const Exps& exponentials,
                                            const char* next, const float* student_d, const float* student_e,
                                            float* d_out, LaneSums& sums) {
    const Exps exps = exponentials;
    const Vec ref = Vec::set(reference);
    Vec sumT[2] = {Vec::zero(), Vec::zero()}, sum1[2] = {Vec::zero(), Vec::zero()};
    Vec cross[2] = {Vec::zero(), Vec::zero()}, plogp[2] = {Vec::zero(), Vec::zero()};
    over_block(z, n, next, [&](auto& x, int i, int lane, auto counts) {
        constexpr int Count = std::extent_v<std::remove_reference_t<decltype(x)>>;
        Vec d[Count], e[Count], e1[Count];
        each<Count>([&](int j) { d[j] = x[j] - ref; });
        exps.atT(d, e);
        if constexpr (Power == 0) exps.at1(d, e1);
        each<Count>([&](int j) {
            const int at = i + j * Vec::width, l = (lane + j) % 2;
            d[j].store(d_out + at);
            const Vec mine = counts(Vec::load(student_e + at)), counted = counts(e[j]);
            const Vec difference = Vec::zero_where_zero(Vec::load(student_d + at) - d[j], mine);
            sumT[l] = sumT[l] + counted;
            cross[l] = Vec::fma(mine, difference, cross[l]);
            const Vec at1 = Power == 0 ? counts(e1[j]) : power<Power>(counted);
            if constexpr (Power != 1) sum1[l] = sum1[l] + at1;
            if constexpr (Entropy) plogp[l] = Vec::fma(at1, Vec::zero_where_zero(d[j], at1), plogp[l]);
        });
    });
    const Vec total = sumT[0] + sumT[1];
    sums = {total, Power == 1 ? total : sum1[0] + sum1[1], cross[0] + cross[1], plogp[0] + plogp[1]};
}

// One term of the gradient: a coefficient and the exponentials that it multiplies; for divergences other than the
// forward KL the teacher's distances or g in their place, and `center`.
struct Term {
    float coefficient;
    const float* e;
    float center;
};

// out = studentT e_s + student1 e1_s - sum of terms, for n columns. `streaming` stores bypass the cache.
template <class T, int Power>
void grad_block(const float* e_s, const float* e1_s, float studentT, float student1, const Term* terms, int n_terms,
                T* out, int n, bool streaming) {
    constexpr int W = Vec::width;
    const Vec a = Vec::set(studentT), b = Vec::set(student1);
    // `Count` neighbouring vectors at once, which share the loads of the coefficients
    auto values = [&](auto count, int i, Vec* r) {
        constexpr int Count = decltype(count)::value;
#pragma GCC unroll 4
        for (int j = 0; j < Count; ++j) {
            Vec e = Vec::load(e_s + i + j * W);
            r[j] = Vec::fma(a, e, b * (Power == 0 ? Vec::load(e1_s + i + j * W) : power<Power>(e)));
        }
        for (int k = 0; k < n_terms; ++k) {
            const Vec coefficient = Vec::set(terms[k].coefficient);
            const float* e = terms[k].e + i;
#pragma GCC unroll 4
            for (int j = 0; j < Count; ++j) r[j] = Vec::fnma(coefficient, Vec::load(e + j * W), r[j]);
        }
    };
    constexpr std::integral_constant<int, 1> one{};
    constexpr std::integral_constant<int, 4> four{};
    Vec r[4];
    int i = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
        if (streaming && n >= W) {
            // Aligned stores after an unaligned first vector. They bypass the cache, whose lines the next row needs.
            const int misaligned = int(reinterpret_cast<uintptr_t>(out) % sizeof(Vec) / sizeof(float));
            if (misaligned != 0) {
                values(one, 0, r);
                store(out, r[0]);
                i = W - misaligned;
            }
            for (; i + 4 * W <= n; i += 4 * W) {
                values(four, i, r);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) r[j].stream(out + i + j * W);
            }
        }
    }
    for (; i + 4 * W <= n; i += 4 * W) {
        values(four, i, r);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(out + i + j * W, r[j]);
    }
    for (; i + W <= n; i += W) {
        values(one, i, r);
        store(out + i, r[0]);
    }
    if (i == n) return;
    if (n < W) {
        values(one, 0, r);
        store_tail(out, r[0], n);
    } else {
        values(one, n - W, r);
        store(out + n - W, r[0]);  // overlaps its predecessor and repeats its values
    }
}

}  // namespace
}  // namespace camkd::cpu
