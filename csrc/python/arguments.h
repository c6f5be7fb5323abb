// How Python passes what kernels take: addresses as integers, matrices as tuples.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../matrix.h"
#include "../row_math.h"

namespace camkd::arguments {

// (address, outer row stride, inner row stride, dtype code)
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int>;

template <class T>
inline T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline Matrix matrix(const MatrixTuple& m) {
    return {pointer<const void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), static_cast<DType>(std::get<3>(m))};
}

inline int fill(const std::vector<MatrixTuple>& from, Matrix* to) {
    if (from.size() > kMaxTeachers)
        throw std::invalid_argument("at most " + std::to_string(kMaxTeachers) + " teachers, got " +
                                    std::to_string(from.size()));
    for (size_t k = 0; k < from.size(); ++k) to[k] = matrix(from[k]);
    return int(from.size());
}

}  // namespace camkd::arguments
