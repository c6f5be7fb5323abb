// Memory of a large output (a gradient of N x C), recycled from one call to the next.
#pragma once

#include <cstddef>

namespace camkd::cpu {

// Below this many bytes a block of whole huge pages would be mostly waste, and malloc keeps what is freed.
constexpr size_t kRecycledBytes = 1024 * 1024;

struct Pages;

// Owns whole pages, uninitialised and aligned to a huge page. A step of training frees the last gradient before it asks
// for the next; taking over those pages saves the page faults of fresh ones, which can take as long as the kernel.
// A few blocks wait between two owners; the large ones are marked so that the system may take them back when it is
// short of memory. Safe from any thread, and in a child after fork.
class OutputMemory {
  public:
    explicit OutputMemory(size_t bytes);  // throws std::bad_alloc
    ~OutputMemory();
    OutputMemory(const OutputMemory&) = delete;
    OutputMemory& operator=(const OutputMemory&) = delete;

    void* data() const;
    size_t bytes() const { return bytes_; }

  private:
    Pages* pages_;
    size_t bytes_;
};

}  // namespace camkd::cpu
