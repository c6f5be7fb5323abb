// Messages between the blocks of a cooperative group, which share a row but are no cluster: any number of blocks,
// wherever they run, meet in device memory, that is in the L2 cache.
#pragma once

#include "../device.cuh"
#include "../launch_table.h"

namespace camkd::cuda {

// A word holds a number and the exchange that it belongs to, and is written and read as a whole. So nothing else has to
// be ordered, and a reader waits for the words that it needs.
using GroupWord = unsigned long long;

CAMKD_DEVICE GroupWord group_word(float number, uint32_t exchange) {
    return GroupWord(exchange) << 32 | float_to_bits(number);
}

// The memory of one launch at a time; zero at first. Exchanges are counted through all launches that use it: the words
// of earlier ones are never taken for those of this one, whatever the cooperative groups were.
struct GroupMemory {
    uint32_t exchanges;  // before this launch
    uint32_t most;       // before this launch, and those of the cooperative group that had the most in it
    uint32_t finished;   // blocks
    uint32_t unused;
    GroupWord words[kGroupWords];  // (cooperative groups, 2 boxes, blocks of a cooperative group, words of a message)
};

// Reads `count` words of one exchange, by a warp, and writes their numbers to shared memory. Blocks that run at once
// need microseconds; if seconds pass, one of them will never come.
template <int several>  // words per lane in flight
CAMKD_DEVICE void receive_words(const GroupWord* words, int count, uint32_t exchange, float* numbers) {
    constexpr int polls = 10'000'000;  // about a microsecond each
    for (int first = thread_id() % kWarp; first < count; first += several * kWarp) {
        GroupWord found[several];
        bool complete = false;
        for (int poll = 0; !complete; ++poll) {
            if (poll == polls) give_up();
            if (poll > 0) pause();
            complete = true;
#pragma unroll
            for (int i = 0; i < several; ++i)
                if (first + i * kWarp < count) found[i] = read_device(words + first + i * kWarp);
#pragma unroll
            for (int i = 0; i < several; ++i)
                if (first + i * kWarp < count) complete = complete && uint32_t(found[i] >> 32) == exchange;
        }
#pragma unroll
        for (int i = 0; i < several; ++i)
            if (first + i * kWarp < count) numbers[first + i * kWarp] = bits_to_float(uint32_t(found[i]));
    }
}

}  // namespace camkd::cuda
