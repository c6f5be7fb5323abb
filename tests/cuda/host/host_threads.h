// The emulated device of host_device.h: threads, warps, blocks and clusters with their barriers and shared memory, and
// how a kernel runs on them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "host_schedule.h"

namespace camkd::cuda {

constexpr int kWarp = 32;

struct alignas(16) Pack {
    uint32_t word[4];
};

namespace host {

// The values that the lanes of a warp exchange. Two sets of slots alternate, so that one barrier per exchange is
// enough.
struct Warp {
    Barrier barrier{kWarp};
    float slots[2][kWarp];
};

struct Block {
    explicit Block(int threads, int bytes)
        : barrier(threads), shared(new Pack[bytes / int(sizeof(Pack)) + 1]), warps(threads / kWarp) {
        std::memset(static_cast<void*>(shared.get()), 0xff, (bytes / sizeof(Pack) + 1) * sizeof(Pack));
        for (auto& warp : warps) warp = std::make_unique<Warp>();
    }
    Barrier barrier;
    std::unique_ptr<Pack[]> shared;
    std::vector<std::unique_ptr<Warp>> warps;
    bool is_last = false;  // of the grid, see last_block
};

struct Cluster {
    Cluster(int size, int threads, int bytes) : barrier(size * threads) {
        for (int i = 0; i < size; ++i) blocks.push_back(std::make_unique<Block>(threads, bytes));
    }
    Barrier barrier;
    std::vector<std::unique_ptr<Block>> blocks;
};

struct Copy {
    void* shared;
    const void* global;
    size_t bytes;
};

struct Thread {
    Cluster* cluster;
    int rank, thread, threads;
    int64_t block, blocks;
    int parity;  // of the next exchange in the warp
    std::vector<Copy> copies;
    size_t last_group = 0, group = 0;  // where in `copies` the last group begins that was ended, and the next one

    // The first `count` copies.
    void finish_copies(size_t count) {
        for (size_t i = 0; i < count; ++i) std::memcpy(copies[i].shared, copies[i].global, copies[i].bytes);
        copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(count));
        last_group -= std::min(count, last_group);
        group -= std::min(count, group);
    }

    Block& own_block() const { return *cluster->blocks[rank]; }
    Warp& own_warp() const { return *own_block().warps[thread / kWarp]; }
};

// Delays after every synchronisation: of single threads now and then, of some warps often, and of some blocks always,
// so that threads meet in orders that an idle machine does not show. The environment variable CAMKD_DELAYS is the seed;
// `on` is set by race_check.cpp.
struct Delays {
    const char* const seed = std::getenv("CAMKD_DELAYS");
    bool on = false;

    static uint32_t hash(uint32_t a, uint32_t b) {
        uint32_t x = (a ^ (b + 0x9e3779b9u)) * 0x85ebca6bu;
        x = (x ^ (x >> 13)) * 0xc2b2ae35u;
        return x ^ (x >> 16);
    }
    void wait() const {
        if (!on) return;
        static thread_local uint32_t calls = 0;
        const uint32_t start = uint32_t(std::atoi(seed));
        const uint32_t block = hash(start, uint32_t(self->block)), warp = hash(block, uint32_t(self->thread / kWarp));
        const uint32_t draw = hash(hash(warp, uint32_t(self->thread)), ++calls);
        int microseconds = 0;
        if (draw % 16 == 0) microseconds += int(draw / 16 % 200);
        if (warp % 3 == 0 && draw / 4096 % 4 == 0) microseconds += 100;
        if (block % 3 == 0) microseconds += 50;
        if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    }
};
inline Delays delays;

#ifdef __SANITIZE_THREAD__

// Removes a single barrier or wait, identified by its call site (an address in the program's file, as for addr2line).
// The environment variable CAMKD_LIST_SITES prints the sites that ran, CAMKD_DROP_SITE removes one.
inline const uintptr_t dropped_site = [] {
    const char* text = std::getenv("CAMKD_DROP_SITE");
    return text ? uintptr_t(std::strtoull(text, nullptr, 16)) : 0;
}();

struct Sites {
    const bool listed = std::getenv("CAMKD_LIST_SITES") != nullptr;
    std::mutex mutex;
    std::map<uintptr_t, const char*> found;

    ~Sites() {
        for (const auto& [address, kind] : found) std::printf("%s %lx\n", kind, static_cast<unsigned long>(address));
    }
};
inline Sites sites;

inline bool runs(const char* kind, const void* site) {
    // The return address follows the call.
    const uintptr_t address = reinterpret_cast<uintptr_t>(site) - 1 - reinterpret_cast<uintptr_t>(&__executable_start);
    if (sites.listed) {
        const Unseen unseen;
        const std::lock_guard<std::mutex> lock(sites.mutex);
        sites.found.emplace(address, kind);
    }
    return address != dropped_site;
}

#else

inline bool runs(const char*, const void*) {
    return true;
}

#endif

// The values of all lanes, in their order.
inline const float* exchange(float x) {
    Warp& warp = self->own_warp();
    float* slots = warp.slots[self->parity];
    self->parity ^= 1;
    slots[self->thread % kWarp] = x;
    warp.barrier.arrive_and_wait();
    delays.wait();
    return slots;
}

// A butterfly reduction as by shuffles: every lane computes the result of each lane in the order of the hardware.
template <class F>
float butterfly(float x, F f) {
    const float* slots = exchange(x);
    float values[kWarp], next[kWarp];
    std::memcpy(values, slots, sizeof(values));
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        for (int lane = 0; lane < kWarp; ++lane) next[lane] = f(values[lane], values[lane ^ offset]);
        std::memcpy(values, next, sizeof(values));
    }
    return values[self->thread % kWarp];
}

inline bool together = false;  // run all clusters at once, and not one after the other
inline int group_size = 1;     // blocks that lie side by side in the grid
inline int64_t lagging = -1;   // a block whose fibers lag
// The bytes of a copy that is on its way: NaN. Kernels sum up rows with a NaN once more, when the copies are there;
// 0x3f instead, which are ordinary logits, give a wrong result where one is read too early.
inline unsigned char expected_copies = 0xff;

// Runs a kernel, with all threads of a cluster at once.
inline void run(int64_t blocks, int cluster_size, int threads, int shared, const std::function<void()>& kernel) {
    std::vector<std::unique_ptr<Cluster>> clusters;
    Crew crew;
    const auto finish = [&] {
        crew.finish();
        clusters.clear();
    };
    for (int64_t first = 0; first < blocks; first += cluster_size) {
        clusters.push_back(std::make_unique<Cluster>(cluster_size, threads, shared));
        for (int rank = 0; rank < cluster_size; ++rank)
            for (int thread = 0; thread < threads; ++thread)
                crew.add(
                    [&, cluster = clusters.back().get(), rank, thread, first] {
                        Thread current{cluster, rank, thread, threads, first + rank, blocks, 0, {}};
                        self = &current;
                        kernel();
                    },
                    first + rank == lagging);
        if (!together) finish();
    }
    finish();
}

}  // namespace host

}  // namespace camkd::cuda
