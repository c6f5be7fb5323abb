#include "output_memory.h"

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <new>

namespace camkd::cpu {

// A mapping of our own: [data, data + bytes), both multiples of a huge page.
struct Pages {
    void* data;
    size_t bytes;
};

namespace {

constexpr size_t kHugePage = 2 * 1024 * 1024;

// From this size on a waiting block is offered to the system (MADV_FREE, which costs time by the page). It is where
// glibc's malloc stops to keep freed memory, too.
constexpr size_t kOffered = 32 * 1024 * 1024;

// Blocks between two owners, each slot only ever exchanged as a whole: no lock that a fork could inherit. Four slots
// hold the gradients of a step with logits and features, which differ in size.
std::array<std::atomic<Pages*>, 4> waiting{};
std::atomic<unsigned> next_displaced{0};

Pages* map_fresh(size_t bytes) {
    // One huge page more than asked for, so that an aligned part can be cut out.
    void* all = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(all);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > begin) munmap(all, aligned - begin);
    munmap(reinterpret_cast<void*>(aligned + bytes), begin + kHugePage - aligned);
    void* data = reinterpret_cast<void*>(aligned);
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint: where it is refused, small pages do
#endif
    return new Pages{data, bytes};
}

void unmap(Pages* pages) {
    if (!pages) return;
    munmap(pages->data, pages->bytes);
    delete pages;
}

// Lets the system take these pages back while they wait; false where it cannot be told.
bool offer(const Pages* pages) {
#if defined(MADV_FREE)
    return madvise(pages->data, pages->bytes, MADV_FREE) == 0;
#else
    return false;
#endif
}

// A waiting block large enough, yet not twice as large: that would hide its size behind an output that looks small.
Pages* take(size_t needed) {
    for (auto& slot : waiting) {
        Pages* pages = slot.exchange(nullptr);
        if (pages && pages->bytes >= needed && pages->bytes / 2 <= needed) return pages;
        unmap(slot.exchange(pages));
    }
    return nullptr;
}

void put(Pages* pages) {
    for (auto& slot : waiting) {
        Pages* none = nullptr;
        if (slot.compare_exchange_strong(none, pages)) return;
    }
    unmap(waiting[next_displaced++ % waiting.size()].exchange(pages));
}

}  // namespace

OutputMemory::OutputMemory(size_t bytes) : bytes_(bytes) {
    const size_t needed = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    pages_ = take(needed);
    if (!pages_) pages_ = map_fresh(needed);
}

OutputMemory::~OutputMemory() {
    if (pages_->bytes < kOffered || offer(pages_))
        put(pages_);
    else
        unmap(pages_);
}

void* OutputMemory::data() const {
    return pages_->data;
}

}  // namespace camkd::cpu
