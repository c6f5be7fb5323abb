// Everything that needs the hardware, behind thin wrappers, so that the kernels are ordinary C++. tests/cuda/host/
// defines the same names for a host compiler and runs the kernels there.
#pragma once

#ifdef CAMKD_DEVICE_HEADER
#include CAMKD_DEVICE_HEADER
#else

#include <cuda_runtime.h>

// CAMKD_FAST_DEBUG enables assertions at run time, so a release build must contain them.
#undef NDEBUG
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

#define CAMKD_DEVICE __device__ __forceinline__
#define CAMKD_GLOBAL __device__  // a variable in device memory, zero when the module is loaded
#define CAMKD_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
// A parameter that stays in constant memory; without this, dynamic indexing would copy it to local memory.
#define CAMKD_PARAMETER const __grid_constant__

namespace camkd::cuda {

constexpr int kWarp = 32;

// 16 bytes, the widest access.
struct alignas(16) Pack {
    uint32_t word[4];
};

CAMKD_DEVICE int thread_id() {
    return int(threadIdx.x);
}
CAMKD_DEVICE int block_threads() {
    return int(blockDim.x);
}
// Blocks that share a row lie side by side in the grid: `group_id` is that of their group, `group_rank` theirs within
// it. Grids without groups have one.
CAMKD_DEVICE int64_t block_id() {
    return int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
}
CAMKD_DEVICE int64_t block_count() {
    return int64_t(gridDim.y) * gridDim.x;
}
CAMKD_DEVICE int group_id() {
    return int(blockIdx.y);
}
CAMKD_DEVICE int group_rank() {
    return int(blockIdx.x);
}
CAMKD_DEVICE void block_barrier() {
    __syncthreads();
}
CAMKD_DEVICE void warp_barrier() {
    __syncwarp();
}

// Reductions over the warp. A butterfly of commutative operations gives every lane the same bits.
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

// Value held by lane `lane ^ bits`; value held by `lane`.
CAMKD_DEVICE float shuffle_xor(float x, int bits) {
    return __shfl_xor_sync(0xffffffffu, x, bits);
}
CAMKD_DEVICE float shuffle(float x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
CAMKD_DEVICE int shuffle(int x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
// True if x is true in any lane.
CAMKD_DEVICE bool warp_any(bool x) {
    return __any_sync(0xffffffffu, x);
}

CAMKD_DEVICE char* shared_memory() {
    extern __shared__ Pack camkd_shared[];
    return reinterpret_cast<char*>(camkd_shared);
}

// --- clusters; before sm_90 every block is its own cluster ---

CAMKD_DEVICE constexpr bool has_clusters() {
#if __CUDA_ARCH__ >= 900
    return true;
#else
    return false;
#endif
}

CAMKD_DEVICE int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return int(rank);
}

// Makes the writes of the warps that publish, to shared and global memory, visible to the whole cluster. A warp that
// publishes waits for all its own stores, those of gradients included.
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

// Messages between the blocks of a cluster: a sender writes to the receiver's shared memory and adds the bytes to its
// mailbox, an mbarrier. Neither side waits for anything else, while a cluster barrier would wait for all stores.
struct Mailbox {
    uint64_t barrier;
};

CAMKD_DEVICE uint32_t shared_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

// Prepares a mailbox, by one thread. A cluster barrier must come before the first message.
CAMKD_DEVICE void mailbox_open(Mailbox* box) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Announces the bytes of a phase, by one thread and once per phase.
CAMKD_DEVICE void mailbox_expect(Mailbox* box, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
                 : "memory");
#endif
}
// Writes `p` to the shared memory of the block of this rank, at the addresses that `at` and `box` have in this block.
CAMKD_DEVICE void mailbox_send(Mailbox* box, int rank, Pack* at, const Pack& p) {
#if __CUDA_ARCH__ >= 900
    uint32_t remote, remote_box;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(at)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_box) : "r"(shared_address(box)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
        "r"(p.word[0]), "r"(p.word[1]), "r"(p.word[2]), "r"(p.word[3]), "r"(remote_box)
        : "memory");
#endif
}
// Waits until all bytes of this phase, counted from 0, have arrived.
CAMKD_DEVICE void mailbox_wait(Mailbox* box, int phase) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred done;\n"
        "again_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=; }" ::"r"(shared_address(box)),
        "r"(phase & 1)
        : "memory");
#endif
}

// --- phases of a block, from sm_90 on ---

// Some threads of a block arrive, others wait, and neither waits for its own kind: a phase is complete when as many
// have arrived as phase_open says, and the next one begins. Arriving publishes what the thread has written.
struct Phase {
    uint64_t barrier;
};

// Prepares a phase that so many arrivals end, by one thread and before a block barrier.
CAMKD_DEVICE void phase_open(Phase* phase, int arrivals) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(phase)), "r"(arrivals) : "memory");
#endif
}
CAMKD_DEVICE void phase_arrive(Phase* phase) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(phase)) : "memory");
#endif
}
// Waits for the end of this phase, counted from 0; nobody may wait for one before the last.
CAMKD_DEVICE void phase_wait(Phase* phase, int number) {
#if __CUDA_ARCH__ >= 900
    // A hint of a millisecond: without it the threads look so often that others have less of the processor
    asm volatile(
        "{ .reg .pred done;\n"
        "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
        "@!done bra again_%=; }" ::"r"(shared_address(phase)),
        "r"(number & 1), "r"(1'000'000)
        : "memory");
#endif
}

// --- memory ---

// Copies 16 bytes from global to shared memory, bypassing registers and L1; visible to this thread after copies_wait().
CAMKD_DEVICE void copy_async(Pack* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same for 8 bytes.
CAMKD_DEVICE void copy_async(int64_t* shared, const int64_t* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// And for 4.
CAMKD_DEVICE void copy_async(float* shared, const float* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
CAMKD_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
// Ends a group of copies. The other function waits for all groups but the last one.
CAMKD_DEVICE void copies_end_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
CAMKD_DEVICE void copies_wait_but_last_group() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
}

CAMKD_DEVICE Pack load_pack(const void* global) {
    Pack p;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
        : "l"(global));
    return p;
}
// For memory that the same launch writes, because scale_rows and any_formula may work in place.
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

// Counts the block's arrival at the end of its work; true for the last of the grid, which sets the counter back to 0
// and sees what all blocks have written. Called by all threads.
CAMKD_DEVICE bool last_block(uint32_t* arrivals) {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        uint32_t before;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
        last = before + 1 == gridDim.x * gridDim.y;
        if (last) *arrivals = 0;
    }
    return __syncthreads_or(last) != 0;
}

// A number in device memory by which the blocks of a launch meet; and how such numbers are read, past the caches.
CAMKD_DEVICE void add_device(unsigned long long* at, unsigned long long x) {
    atomicAdd(at, x);
}
template <class Number>
CAMKD_DEVICE Number read_device(const Number* at) {
    return *static_cast<const volatile Number*>(at);
}
template <class Number>
CAMKD_DEVICE void write_device(Number* at, Number x) {
    *static_cast<volatile Number*>(at) = x;
}
CAMKD_DEVICE void max_device(uint32_t* at, uint32_t x) {
    atomicMax(at, x);
}
// Between two looks at a number that another block will write.
CAMKD_DEVICE void pause() {}
// Ends the launch with an error.
CAMKD_DEVICE void give_up() {
    __trap();
}

// Stops the compiler from computing a pointer or a number anew wherever it is used.
template <class Pointer>
CAMKD_DEVICE void keep_in_register(Pointer*& pointer) {
    asm volatile("" : "+l"(pointer));
}
CAMKD_DEVICE void keep_in_register(int& number) {
    asm volatile("" : "+r"(number));
}
CAMKD_DEVICE void keep_in_register(uint32_t& bits) {
    asm volatile("" : "+r"(bits));
}

// --- arithmetic ---

// 2^x with an error of 2 ulp; 0 where the result is subnormal.
CAMKD_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x with an error of 1 ulp for x between 2^-126 and 2^126, without the branch of a division for others.
CAMKD_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return fmaf(fmaf(-x, y, 1.0f), y, y);
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
// Two floats, rounded to nearest even, in one word with `low` in its low half.
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
// Maxima of the two 16-bit numbers of a word. Where one operand is NaN, the other one.
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
CAMKD_DEVICE void check_label(bool label_valid) {
    assert(label_valid && "camkd_fast: a label lies outside [0, C)");
}

}  // namespace camkd::cuda

#endif
