// Allocation of OutputMemory, and the free blocks that are kept between two owners.
#include "output_memory.h"

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <new>

namespace camkd::cpu {

// An anonymous mapping [data, data + bytes); both are multiples of a huge page.
struct Pages {
    void* data;
    size_t bytes;
};

namespace {

constexpr size_t kHugePage = 2 * 1024 * 1024;

// Free blocks of this size and above are marked reclaimable (MADV_FREE, whose cost grows with the number of pages).
// glibc's malloc also returns freed memory from this size on.
constexpr size_t kReclaimable = 32 * 1024 * 1024;

// Free blocks. Slots are exchanged atomically, so there is no lock that a fork could inherit. Four slots hold the
// gradients of a step with logits and features, which differ in size.
std::array<std::atomic<Pages*>, 4> free_blocks{};
std::atomic<unsigned> next_displaced{0};

Pages* map_fresh(size_t bytes) {
    // One huge page more than requested, so that an aligned part can be cut out
    void* all = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(all);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > begin) munmap(all, aligned - begin);
    munmap(reinterpret_cast<void*>(aligned + bytes), begin + kHugePage - aligned);
    void* data = reinterpret_cast<void*>(aligned);
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint; if refused, small pages are used
#endif
    return new Pages{data, bytes};
}

void unmap(Pages* pages) {
    if (!pages) return;
    munmap(pages->data, pages->bytes);
    delete pages;
}

// Lets the system reclaim these pages while they are free. Returns false if it has no such call, or refuses.
bool mark_reclaimable(const Pages* pages) {
#if defined(MADV_FREE)
    return madvise(pages->data, pages->bytes, MADV_FREE) == 0;
#else
    return false;
#endif
}

// A free block of at least `needed` bytes and less than about twice that: a small output must not hold a large block.
Pages* take(size_t needed) {
    for (auto& slot : free_blocks) {
        Pages* pages = slot.exchange(nullptr);
        if (pages && pages->bytes >= needed && pages->bytes / 2 <= needed) return pages;
        unmap(slot.exchange(pages));
    }
    return nullptr;
}

void put(Pages* pages) {
    for (auto& slot : free_blocks) {
        Pages* none = nullptr;
        if (slot.compare_exchange_strong(none, pages)) return;
    }
    unmap(free_blocks[next_displaced++ % free_blocks.size()].exchange(pages));
}

}  // namespace

OutputMemory::OutputMemory(size_t bytes) : bytes_(bytes) {
    const size_t needed = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    pages_ = take(needed);
    if (!pages_) pages_ = map_fresh(needed);
}

OutputMemory::~OutputMemory() {
    if (pages_->bytes < kReclaimable || mark_reclaimable(pages_))
        put(pages_);
    else
        unmap(pages_);
}

void* OutputMemory::data() const {
    return pages_->data;
}

}  // namespace camkd::cpu
