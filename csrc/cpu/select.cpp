// Picks the instruction set at run time.
#include <sys/mman.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "api.h"

namespace camkd::cpu {
namespace {

constexpr int64_t kHugePage = 2 * 1024 * 1024;

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
    const char* wanted = std::getenv("CAMKD_FAST_ISA");
    for (const Kernels* candidate : candidates) {
        if (wanted && std::string(wanted) != candidate->name) continue;
        if (runs(*candidate)) return *candidate;
        if (wanted)
            throw std::runtime_error(std::string("CAMKD_FAST_ISA=") + wanted + " does not run on this processor");
    }
    throw std::runtime_error(std::string("CAMKD_FAST_ISA must be baseline, avx2 or avx512, got ") + wanted);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = select();
    return chosen;
}

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
    // A hint: where it is refused, small pages do.
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace camkd::cpu
