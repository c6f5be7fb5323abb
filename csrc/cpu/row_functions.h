// Selects the passes over a block (row_blocks.h) for a call of the logit loss, by dtype, temperature and weighting.
#pragma once

#include "row_blocks.h"

namespace camkd::cpu {
namespace {

// The functions of one call, chosen once.
struct RowFunctions {
    using Max = float (*)(const void*, int64_t, int);
    using Student = void (*)(const void*, int64_t, int, float, const Exps&, const char*, float*, float*, float*,
                             LaneSums&);
    using Teacher = void (*)(const void*, int64_t, int, float, const Exps&, const char*, const float*, float*,
                             LaneSums&);
    using Grad = void (*)(const float*, const float*, float, float, const Term*, int, void*, int64_t, int, bool);
    Max max[kMaxStreams];
    Student student;
    Teacher teachers[kMaxTeachers], masked_teachers[kMaxTeachers];
    Grad grad;
    int power;
};

template <int Power, bool Entropy, bool Masked>
RowFunctions::Teacher teacher_of(DType dtype) {
    return with_dtype(dtype, [](auto t) -> RowFunctions::Teacher {
        using T = decltype(t);
        return [](const void* z, int64_t c, int n, float ref, const Exps& exps, const char* next, const float* d,
                  float* e, LaneSums& sums) {
            teacher_block<T, Power, Entropy, Masked>(static_cast<const T*>(z) + c, n, ref, exps, next, d, e, sums);
        };
    });
}

template <int Power, bool Entropy>
RowFunctions choose_functions(const RowLossArgs& args) {
    RowFunctions f{};
    f.power = Power;
    auto max_of = [](DType dtype) {
        return with_dtype(dtype, [](auto t) -> RowFunctions::Max {
            using T = decltype(t);
            return [](const void* x, int64_t c, int n) { return block_max(static_cast<const T*>(x) + c, n); };
        });
    };
    f.max[0] = max_of(args.streams[0].dtype);
    f.student = with_dtype(args.streams[0].dtype, [](auto t) -> RowFunctions::Student {
        using T = decltype(t);
        return [](const void* s, int64_t c, int n, float ref, const Exps& exps, const char* next, float* d, float* e,
                  float* e1, LaneSums& sums) {
            student_block<T, Power>(static_cast<const T*>(s) + c, n, ref, exps, next, d, e, e1, sums);
        };
    });
    f.grad = with_dtype(args.streams[0].dtype, [](auto t) -> RowFunctions::Grad {
        using T = decltype(t);
        return [](const float* e, const float* e1, float studentT, float student1, const Term* terms, int count,
                  void* out, int64_t c, int n, bool streaming) {
            grad_block<T, Power>(e, e1, studentT, student1, terms, count, static_cast<T*>(out) + c, n, streaming);
        };
    });
    for (int k = 0; k < args.K; ++k) {
        f.max[k + 1] = max_of(args.streams[k + 1].dtype);
        f.teachers[k] = teacher_of<Power, Entropy, false>(args.streams[k + 1].dtype);
        f.masked_teachers[k] = teacher_of<Power, Entropy, true>(args.streams[k + 1].dtype);
    }
    return f;
}

inline RowFunctions choose_functions(const RowLossArgs& args) {
    auto with_entropy = [&](auto power) {
        constexpr int P = decltype(power)::value;
        return args.formula.weighting == Weighting::entropy ? choose_functions<P, true>(args)
                                                            : choose_functions<P, false>(args);
    };
    switch (temperature_power(args.formula.temperature)) {
        case 1:
            return with_entropy(std::integral_constant<int, 1>{});
        case 2:
            return with_entropy(std::integral_constant<int, 2>{});
        case 4:
            return with_entropy(std::integral_constant<int, 4>{});
        default:
            return with_entropy(std::integral_constant<int, 0>{});
    }
}

}  // namespace
}  // namespace camkd::cpu
