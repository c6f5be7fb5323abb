// Messages between the blocks that share a row: a cluster, or a cooperative group (group_memory.cuh).
#pragma once

#include "group.cuh"

namespace camkd::cuda {

// Every block sends its part of a row to all blocks. Exchanges alternate between two inboxes: a block that sends for
// the exchange after the next one has received every message of the next one, and each of these was sent after its
// sender had read this exchange's inbox. Used by one warp.
// `Words`: of a message through memory, those that a lane reads at once; more take more registers.
template <class Group, int Words = 4>
class RowExchange {
  public:
    CAMKD_DEVICE RowExchange(const Group& group) : group_(group) {}

    // Sends the first `packs` packs of the outgoing message, and waits for those of the other blocks. Returns the
    // number of the exchange, for Group::inbox.
    CAMKD_DEVICE uint32_t run(int packs) {
        const uint32_t exchange = count_++;
        warp_barrier();
        if (group_.cooperative()) {
            through_memory(exchange, packs);
            return exchange;
        }
        if (group_.lane() == 0) mailbox_expect(group_.box(exchange), group_.blocks() * packs * RowShared::pack_bytes);
        for (int i = group_.lane(); i < group_.blocks() * packs; i += kWarp)
            mailbox_send(group_.box(exchange), i / packs, group_.inbox(exchange, group_rank(), 0) + i % packs,
                         group_.outgoing(0)[i % packs]);
        mailbox_wait(group_.box(exchange), int(exchange / 2));
        return exchange;
    }

    // Before a cooperative group's first exchange.
    CAMKD_DEVICE void start() {
        if (group_.cooperative()) count_ = read_device(&group_.launch.memory->exchanges);
    }

    // After the last one, by the warp that made them.
    CAMKD_DEVICE void end() const {
        if (group_.cooperative() && group_.lane() == 0) max_device(&group_.launch.memory->most, count_);
    }

    // Then by all threads.
    CAMKD_DEVICE void finish() const {
        if (!group_.cooperative()) return;
        GroupMemory* const memory = group_.launch.memory;
        if (last_block(&memory->finished) && thread_id() == 0)
            write_device(&memory->exchanges, read_device(&memory->most));
    }

  private:
    CAMKD_DEVICE void through_memory(uint32_t exchange, int packs) {
        const int of_pack = int(sizeof(Pack) / sizeof(float)), stride = group_.message_floats();
        const int blocks = group_.blocks(), box = group_id() * 2 + int(exchange & 1);
        const uint32_t number = exchange + 1;
        GroupWord* const words = group_.launch.memory->words + int64_t(box) * blocks * stride;
        const float* const mine = reinterpret_cast<const float*>(group_.outgoing(0));
        // Whole messages, whatever they have: the words of all blocks then lie side by side
        for (int i = group_.lane(); i < stride; i += kWarp)
            write_device(words + group_rank() * stride + i, group_word(i < packs * of_pack ? mine[i] : 0.0f, number));
        receive_words<Words>(words, blocks * stride, number, reinterpret_cast<float*>(group_.inbox(exchange, 0, 0)));
        warp_barrier();
    }

    const Group group_;
    uint32_t count_ = 0;  // exchanges so far; of a cooperative group with those of earlier launches
};

}  // namespace camkd::cuda
