// Picks the best instruction set that the processor supports, or the one that CAMKD_FAST_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "api.h"

namespace camkd::cpu {
namespace {

bool runs(const Kernels& candidate) {
#if defined(CAMKD_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (&candidate == &kernels_avx2) return avx2;
    if (&candidate == &kernels_avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return &candidate == &kernels_baseline;
}

const Kernels& select() {
#if defined(CAMKD_X86)
    const Kernels* candidates[] = {&kernels_avx512, &kernels_avx2, &kernels_baseline};
#else
    const Kernels* candidates[] = {&kernels_baseline};
#endif
    const char* requested = std::getenv("CAMKD_FAST_ISA");
    for (const Kernels* candidate : candidates) {
        if (requested && std::string(requested) != candidate->name) continue;
        if (runs(*candidate)) return *candidate;
        if (requested)
            throw std::runtime_error(std::string("CAMKD_FAST_ISA=") + requested + " does not run on this processor");
    }
    throw std::runtime_error(std::string("CAMKD_FAST_ISA must be baseline, avx2 or avx512, got ") + requested);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = select();
    return chosen;
}

}  // namespace camkd::cpu
