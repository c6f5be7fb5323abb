// Messages between the blocks of a cluster that share a row.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

// Every block sends its part of a row to all blocks. Exchanges alternate between two inboxes: a block that sends for
// the exchange after the next one has received every message of the next one, and each of these was sent after its
// sender had read this exchange's inbox. Used by one warp.
template <class Group>
class ClusterExchange {
  public:
    CAMKD_DEVICE ClusterExchange(const Group& group) : group_(group) {}

    // Sends the first `packs` packs of the outgoing message, and waits for those of the other blocks. Returns the
    // number of the exchange, for Group::inbox.
    CAMKD_DEVICE int run(int packs) {
        const int exchange = count_++;
        warp_barrier();
        if (group_.lane() == 0) mailbox_expect(group_.box(exchange), group_.cluster() * packs * RowShared::pack_bytes);
        for (int i = group_.lane(); i < group_.cluster() * packs; i += kWarp)
            mailbox_send(group_.box(exchange), i / packs, group_.inbox(exchange, group_.rank, 0) + i % packs,
                         group_.outgoing(0)[i % packs]);
        mailbox_wait(group_.box(exchange), exchange / 2);
        return exchange;
    }

  private:
    const Group group_;
    int count_ = 0;  // exchanges so far
};

}  // namespace camkd::cuda
