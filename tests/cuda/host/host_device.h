// The functions of csrc/cuda/device.cuh for a host compiler: a thread or fiber per CUDA thread (host_schedule.h),
// barriers for warps, blocks and clusters, shared memory filled with 0xff (NaN), and asynchronous copies that happen
// only in copies_wait().
//
// It cannot show the weaker memory order of a GPU, lanes of a warp that depend on running in lockstep, the limits of
// registers and real shared memory, alignment traps other than check_aligned, the approximation error of the hardware's
// exponential, or speed.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "host_threads.h"

// Helpers are inlined and barriers are not, so that each barrier has one call site in each caller of a helper.
#define CAMKD_DEVICE inline __attribute__((always_inline))
#define CAMKD_SITE inline __attribute__((noinline))
#define CAMKD_GLOBAL inline
#define CAMKD_KERNEL(threads, blocks_per_sm) void
#define CAMKD_PARAMETER const

namespace camkd::cuda {

inline int thread_id() {
    return host::self->thread;
}
inline int block_threads() {
    return host::self->threads;
}
inline int64_t block_id() {
    return host::self->block;
}
inline int64_t block_count() {
    return host::self->blocks;
}
inline int group_id() {
    return int(host::self->block / host::group_size);
}
inline int group_rank() {
    return int(host::self->block % host::group_size);
}
CAMKD_SITE void block_barrier() {
#ifndef CAMKD_DROP_BLOCK_BARRIER
    if (host::runs("BLOCK_BARRIER", __builtin_return_address(0))) host::self->own_block().barrier.arrive_and_wait();
#endif
    host::delays.wait();
}
CAMKD_SITE void warp_barrier() {
#ifndef CAMKD_DROP_WARP_BARRIER
    if (host::runs("WARP_BARRIER", __builtin_return_address(0))) host::self->own_warp().barrier.arrive_and_wait();
#endif
    host::delays.wait();
}
CAMKD_SITE void cluster_barrier(bool) {
#ifndef CAMKD_DROP_CLUSTER_BARRIER
    if (host::runs("CLUSTER_BARRIER", __builtin_return_address(0))) host::self->cluster->barrier.arrive_and_wait();
#endif
    host::delays.wait();
}
inline constexpr bool has_clusters() {
    return true;
}
inline int cluster_rank() {
    return host::self->rank;
}

inline float warp_sum(float x) {
    return host::butterfly(x, [](float a, float b) { return a + b; });
}
inline float warp_max(float x) {
    return host::butterfly(x, [](float a, float b) { return std::fmax(a, b); });
}

inline float shuffle_xor(float x, int bits) {
    return host::exchange(x)[(host::self->thread % kWarp) ^ bits];
}
inline float shuffle(float x, int lane) {
    return host::exchange(x)[lane];
}

inline int shuffle(int x, int lane) {
    float bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const float* const values = host::exchange(bits);
    std::memcpy(&x, values + lane, sizeof(x));
    return x;
}

inline bool warp_any(bool x) {
    return host::butterfly(float(x), [](float a, float b) { return std::fmax(a, b); }) > 0;
}

inline char* shared_memory() {
    return reinterpret_cast<char*>(host::self->own_block().shared.get());
}
// The address in the block of this rank that corresponds to `own` in this block.
template <class T>
T* remote(T* own, int rank) {
    const auto offset = reinterpret_cast<char*>(own) - shared_memory();
    return reinterpret_cast<T*>(reinterpret_cast<char*>(host::self->cluster->blocks[rank]->shared.get()) + offset);
}

// Bytes that have not arrived yet, plus kUnannounced before mailbox_expect; and the number of completed phases.
struct Mailbox {
    static constexpr int32_t kUnannounced = 1 << 24;
    std::atomic<int32_t> missing, phases;

    void add(int32_t bytes) {
        // Only the receiver acquires; a message does not order the senders among each other.
        if (missing.fetch_add(bytes, std::memory_order_release) + bytes != 0) return;
        missing.fetch_add(kUnannounced, std::memory_order_relaxed);
        phases.fetch_add(1, std::memory_order_relaxed);
    }
};
inline void mailbox_open(Mailbox* box) {
    new (box) Mailbox{{Mailbox::kUnannounced}, {0}};
}
inline void mailbox_expect(Mailbox* box, int bytes) {
    box->add(bytes - Mailbox::kUnannounced);
}
inline void mailbox_send(Mailbox* box, int rank, Pack* at, const Pack& p) {
    host::delays.wait();
    *remote(at, rank) = p;
    remote(box, rank)->add(-int32_t(sizeof(Pack)));
}
CAMKD_SITE void mailbox_wait(Mailbox* box, int phase) {
#ifndef CAMKD_DROP_MAILBOX_WAIT
    if (!host::runs("MAILBOX_WAIT", __builtin_return_address(0))) return;
    const auto start = std::chrono::steady_clock::now();
    while (box->phases.load(std::memory_order_relaxed) <= phase) {
        if (host::delays.on)
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        else
            host::yield();
        if (std::chrono::steady_clock::now() - start > std::chrono::minutes(1)) std::abort();
    }
    box->missing.load(std::memory_order_acquire);
#endif
    host::delays.wait();
}

struct Phase {
    std::atomic<int32_t> arrivals, missing, phases;
};
inline void phase_open(Phase* phase, int arrivals) {
    new (phase) Phase{{arrivals}, {arrivals}, {0}};
}
inline void phase_arrive(Phase* phase) {
    host::delays.wait();
    if (phase->missing.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    phase->missing.store(phase->arrivals.load(std::memory_order_relaxed), std::memory_order_relaxed);
    phase->phases.fetch_add(1, std::memory_order_release);
}
CAMKD_SITE void phase_wait(Phase* phase, int number) {
#ifndef CAMKD_DROP_PHASE_WAIT
    if (!host::runs("PHASE_WAIT", __builtin_return_address(0))) return;
    const auto start = std::chrono::steady_clock::now();
    // As on the device, where a waiting thread knows only whether the number of the phase is even
    while ((phase->phases.load(std::memory_order_acquire) & 1) == (number & 1)) {
        if (host::delays.on)
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        else
            host::yield();
        if (std::chrono::steady_clock::now() - start > std::chrono::minutes(1)) std::abort();
    }
#endif
    host::delays.wait();
}

inline void check_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Pack) != 0) std::abort();
}

inline void copy_async(Pack* shared, const void* global) {
    check_aligned(global);
    std::memset(static_cast<void*>(shared), host::expected_copies, sizeof(Pack));
    host::self->copies.push_back({shared, global, sizeof(Pack)});
}
inline void copy_async(int64_t* shared, const int64_t* global) {
    std::memset(shared, host::expected_copies, sizeof(*shared));
    host::self->copies.push_back({shared, global, sizeof(*shared)});
}
inline void copy_async(float* shared, const float* global) {
    std::memset(shared, host::expected_copies, sizeof(*shared));
    host::self->copies.push_back({shared, global, sizeof(*shared)});
}
CAMKD_SITE void copies_wait() {
#ifndef CAMKD_DROP_COPIES_WAIT
    if (!host::runs("COPIES_WAIT", __builtin_return_address(0))) return;
    host::self->finish_copies(host::self->copies.size());
#endif
    host::delays.wait();
}
inline void copies_end_group() {
    host::self->last_group = host::self->group;
    host::self->group = host::self->copies.size();
}
CAMKD_SITE void copies_wait_but_last_group() {
#ifndef CAMKD_DROP_COPIES_WAIT
    if (!host::runs("COPIES_WAIT", __builtin_return_address(0))) return;
    host::self->finish_copies(host::self->last_group);
#endif
    host::delays.wait();
}
inline Pack load_pack(const void* global) {
    check_aligned(global);
    Pack p;
    std::memcpy(&p, global, sizeof(p));
    return p;
}
inline Pack load_pack_coherent(const void* global) {
    return load_pack(global);
}
inline void store_pack(void* global, Pack p) {
    check_aligned(global);
    std::memcpy(global, &p, sizeof(p));
}

inline void add_device(unsigned long long* at, unsigned long long x) {
    std::atomic_ref(*at).fetch_add(x, std::memory_order_relaxed);
}
template <class Number>
Number read_device(const Number* at) {
    return std::atomic_ref(const_cast<Number&>(*at)).load(std::memory_order_relaxed);
}
template <class Number>
void write_device(Number* at, Number x) {
    host::delays.wait();
    std::atomic_ref(*at).store(x, std::memory_order_relaxed);
    if (host::lagging >= 0) host::yield();  // others may read this before the lagging block goes on
}
inline void max_device(uint32_t* at, uint32_t x) {
    std::atomic_ref<uint32_t> number(*at);
    for (uint32_t seen = number.load(); seen < x && !number.compare_exchange_weak(seen, x);) {
    }
}
inline void pause() {
    host::yield();
}
inline void give_up() {
    std::abort();
}
template <class Kept>
void keep_in_register(Kept&) {}
inline bool last_block(uint32_t* arrivals) {
    host::Block& block = host::self->own_block();
    block.barrier.arrive_and_wait();
    host::delays.wait();
    if (thread_id() == 0) {
        const uint32_t before = std::atomic_ref(*arrivals).fetch_add(1, std::memory_order_acq_rel);
        block.is_last = int64_t(before) + 1 == block_count();
        if (block.is_last) *arrivals = 0;
    }
    block.barrier.arrive_and_wait();
    return block.is_last;
}

// --- arithmetic ---

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal(float x) {
    return 1.0f / x;
}
inline float half_to_float(uint32_t bits) {
    _Float16 half;
    const uint16_t narrow = uint16_t(bits);
    std::memcpy(&half, &narrow, sizeof(half));
    return float(half);
}
inline uint32_t float_to_half(float x) {
    const _Float16 half = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
}
inline uint32_t float_to_bfloat(float x) {
    if (x != x) return 0x7fff;
    const uint32_t bits = float_to_bits(x);
    return (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
}
inline uint32_t floats_to_halves(float low, float high) {
    return float_to_half(low) | float_to_half(high) << 16;
}
inline uint32_t floats_to_bfloats(float low, float high) {
    return float_to_bfloat(low) | float_to_bfloat(high) << 16;
}
inline uint32_t max_halves(uint32_t a, uint32_t b) {
    return floats_to_halves(std::fmax(half_to_float(a & 0xffffu), half_to_float(b & 0xffffu)),
                            std::fmax(half_to_float(a >> 16), half_to_float(b >> 16)));
}
inline uint32_t max_bfloats(uint32_t a, uint32_t b) {
    return floats_to_bfloats(std::fmax(bits_to_float(a << 16), bits_to_float(b << 16)),
                             std::fmax(bits_to_float(a & 0xffff0000u), bits_to_float(b & 0xffff0000u)));
}

inline void check_label(bool label_valid) {
    if (!label_valid) std::abort();
}

}  // namespace camkd::cuda
