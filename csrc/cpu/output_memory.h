// Memory of a large output (a gradient of N x C), recycled from one call to the next.
#pragma once

#include <cstddef>

namespace camkd::cpu {

// Smaller outputs come from malloc, which keeps memory of this size when it is freed; whole huge pages would be mostly
// waste.
constexpr size_t kRecycledBytes = 1024 * 1024;

struct Pages;

// Owns whole pages, uninitialised and aligned to a huge page. A training step frees the last gradient before it
// allocates the next; reusing those pages saves the page faults of fresh ones, which can take as long as the kernel. A
// few free blocks are kept; the large ones are marked so that the system may reclaim them when memory is short.
// Thread-safe, and safe in a child after fork.
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
