// Selects the passes over a block (row_blocks.h) for a call of the logit loss, by dtype, temperature and weighting.
#pragma once

#include "row_divergences.h"

namespace camkd::cpu {
namespace {

// The functions of one call, chosen once. Of the two for gradients the divergence needs one.
struct RowFunctions {
    using Max = float (*)(const void*, int64_t, int);
    using Student = void (*)(const void*, int64_t, int, float, const Exps&, const char*, float*, float*, float*,
                             LaneSums&);
    using Teacher = void (*)(const void*, int64_t, int, float, const Exps&, const char*, const float*, const float*,
                             float*, LaneSums&);
    using Grad = void (*)(const float*, const float*, float, float, const Term*, int, void*, int64_t, int, bool);
    using ProductGrad = void (*)(const float*, const float*, const float*, float, float, const Term*, int, void*,
                                 int64_t, int);
    Max max[kMaxStreams];
    Student student;
    Teacher teachers[kMaxTeachers], masked_teachers[kMaxTeachers];
    Grad grad;
    ProductGrad product_grad;
    int power;
};

template <int Power, bool Entropy, bool Masked>
RowFunctions::Teacher teacher_of(DType dtype) {
    return with_dtype(dtype, [](auto t) -> RowFunctions::Teacher {
        using T = decltype(t);
        return [](const void* z, int64_t c, int n, float ref, const Exps& exps, const char* next, const float* d,
                  const float*, float* e, LaneSums& sums) {
            teacher_block<T, Power, Entropy, Masked>(static_cast<const T*>(z) + c, n, ref, exps, next, d, e, sums);
        };
    });
}

template <int Power, bool Entropy>
RowFunctions::Teacher reverse_of(DType dtype) {
    return with_dtype(dtype, [](auto t) -> RowFunctions::Teacher {
        using T = decltype(t);
        return [](const void* z, int64_t c, int n, float ref, const Exps& exps, const char* next, const float* d,
                  const float* e, float* d_out, LaneSums& sums) {
            reverse_block<T, Power, Entropy>(static_cast<const T*>(z) + c, n, ref, exps, next, d, e, d_out, sums);
        };
    });
}

inline RowFunctions::Max max_of(DType dtype) {
    return with_dtype(dtype, [](auto t) -> RowFunctions::Max {
        using T = decltype(t);
        return [](const void* x, int64_t c, int n) { return block_max(static_cast<const T*>(x) + c, n); };
    });
}

template <int Power, bool Entropy>
RowFunctions::Student student_of(DType dtype) {
    return with_dtype(dtype, [](auto t) -> RowFunctions::Student {
        using T = decltype(t);
        return [](const void* s, int64_t c, int n, float ref, const Exps& exps, const char* next, float* d, float* e,
                  float* e1, LaneSums& sums) {
            student_block<T, Power, Entropy>(static_cast<const T*>(s) + c, n, ref, exps, next, d, e, e1, sums);
        };
    });
}

// The type of stream k as the passes of row_blocks.h read it: logits of a LogitMap are float.
inline DType type_read(const RowLossArgs& args, int k) {
    return args.formula.maps ? DType::f32 : args.streams[k].dtype;
}

template <int Power, bool Entropy>
RowFunctions choose_functions(const RowLossArgs& args) {
    RowFunctions f{};
    f.power = Power;
    const DType own = type_read(args, 0);
    f.max[0] = max_of(args.streams[0].dtype);
    f.student = args.formula.entropy ? student_of<Power, true>(own) : student_of<Power, false>(own);
    f.grad = with_dtype(own, [](auto t) -> RowFunctions::Grad {
        using T = decltype(t);
        return [](const float* e, const float* e1, float studentT, float student1, const Term* terms, int count,
                  void* out, int64_t c, int n, bool streaming) {
            grad_block<T, Power>(e, e1, studentT, student1, terms, count, static_cast<T*>(out) + c, n, streaming);
        };
    });
    f.product_grad = with_dtype(own, [](auto t) -> RowFunctions::ProductGrad {
        using T = decltype(t);
        return [](const float* e, const float* e1, const float* d, float studentT, float student1, const Term* terms,
                  int count, void* out, int64_t c, int n) {
            product_grad_block<T, Power>(e, e1, d, studentT, student1, terms, count, static_cast<T*>(out) + c, n);
        };
    });
    const bool reverse = args.formula.divergence == Divergence::reverse_kl;
    for (int k = 0; k < args.K; ++k) {
        const DType dtype = type_read(args, k + 1);
        f.max[k + 1] = max_of(args.streams[k + 1].dtype);
        f.teachers[k] = reverse ? reverse_of<Power, Entropy>(dtype) : teacher_of<Power, Entropy, false>(dtype);
        f.masked_teachers[k] = reverse ? f.teachers[k] : teacher_of<Power, Entropy, true>(dtype);
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
