// Everything that only the hardware can do, behind thin wrappers, so that the kernels above them are ordinary C++:
// tests/cuda_host/ defines the same names for a host compiler and runs the same sources there.
#pragma once

#ifdef CAMKD_DEVICE_HEADER
#include CAMKD_DEVICE_HEADER
#else

#include <cuda_runtime.h>

// CAMKD_FAST_DEBUG asks for assertions at run time: they must survive a release build.
#undef NDEBUG
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

#define CAMKD_DEVICE __device__ __forceinline__
#define CAMKD_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
// A parameter that stays in constant memory however it is indexed; otherwise a copy would go to local memory.
#define CAMKD_PARAMETER const __grid_constant__

namespace camkd::cuda {

constexpr int kWarp = 32;

// 16 bytes: the widest access there is.
struct alignas(16) Pack {
    uint32_t word[4];
};

CAMKD_DEVICE int thread_id() {
    return int(threadIdx.x);
}
CAMKD_DEVICE int block_threads() {
    return int(blockDim.x);
}
CAMKD_DEVICE int64_t block_id() {
    return blockIdx.x;
}
CAMKD_DEVICE int64_t block_count() {
    return gridDim.x;
}
CAMKD_DEVICE void block_barrier() {
    __syncthreads();
}
CAMKD_DEVICE void warp_barrier() {
    __syncwarp();
}

// Over the warp, the same bits in every lane: a butterfly of commutative operations.
CAMKD_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
CAMKD_DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

CAMKD_DEVICE char* shared_memory() {
    extern __shared__ Pack camkd_shared[];
    return reinterpret_cast<char*>(camkd_shared);
}

// --- clusters: before sm_90 every block is one of its own ---

CAMKD_DEVICE int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return int(rank);
}

// Orders what the warps that publish have written, to shared and global memory, before what anybody in the cluster
// reads after it. A warp that publishes waits for its own stores, residuals among them.
CAMKD_DEVICE void cluster_barrier(bool publishes) {
#if __CUDA_ARCH__ >= 900
    if (publishes)
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    else
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The value that the block of this rank keeps where this block has `mine`.
CAMKD_DEVICE float load_remote(const float* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t address = uint32_t(__cvta_generic_to_shared(mine)), remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
#else
    return *mine;
#endif
}

// --- memory ---

// 16 bytes from global to shared memory past the registers and L1; visible to this thread after copies_wait().
CAMKD_DEVICE void copy_async(Pack* shared, const void* global) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
CAMKD_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

CAMKD_DEVICE Pack load_pack(const void* global) {
    Pack p;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
        : "l"(global));
    return p;
}
// For memory that the same launch writes: `scale_rows` may work in place.
CAMKD_DEVICE Pack load_pack_coherent(const void* global) {
    Pack p;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
                 : "l"(global)
                 : "memory");
    return p;
}
CAMKD_DEVICE void store_pack(void* global, Pack p) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(p.word[0]), "r"(p.word[1]),
                 "r"(p.word[2]), "r"(p.word[3])
                 : "memory");
}

// --- arithmetic ---

// 2^x to 2 ulp; 0 below the normal numbers.
CAMKD_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
CAMKD_DEVICE float bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}
CAMKD_DEVICE uint32_t float_to_bits(float x) {
    return __float_as_uint(x);
}
CAMKD_DEVICE float half_to_float(uint32_t bits) {
    float y;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "r"(bits));
    return y;
}
// Two floats, rounded to nearest even, in one word: `low` in its low half.
CAMKD_DEVICE uint32_t floats_to_halves(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
CAMKD_DEVICE uint32_t floats_to_bfloats(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
// Maxima of the two 16-bit numbers of a word; the other one where one is NaN.
CAMKD_DEVICE uint32_t max_halves(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}
CAMKD_DEVICE uint32_t max_bfloats(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

// CAMKD_FAST_DEBUG=1: stops the kernel with a message.
CAMKD_DEVICE void check_label(bool fits) {
    assert(fits && "camkd_fast: a label lies outside [0, C)");
}

}  // namespace camkd::cuda

#endif
