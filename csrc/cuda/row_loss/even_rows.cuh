// Access of a warp to rows that are all alike: every row begins and ends at a 16-byte boundary, has one label, and lies
// at the same distance from the row before. A lane then has the same vectors of each of them.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

// Whether all rows of a launch are like that. Bytes of rows and strides must fit 32 bits.
inline bool rows_alike(const RowLaunch& launch) {
    constexpr int64_t most = 1 << 26;
    const RowLossArgs& args = launch.args;
    if (!launch.even || (args.grad_student && !launch.wide_out) || args.second.target) return false;
    if (args.N > args.S || args.N > most) return false;
    for (int k = 0; k <= args.K; ++k)
        if (uint64_t(args.streams[k].stride_inner) > uint64_t(most)) return false;
    return true;
}

template <class T, int K>
class EvenRows {
    using Group = RowGroup<T, true, K>;
    static constexpr int V = kVector<T>;
    static constexpr int kVectorStride = kWarp * int(sizeof(Pack));  // from one vector of a lane to the next one

  public:
    static constexpr DType kDtype = Elements<T>::dtype;
    static constexpr int kIgnored = -2, kInvalid = -1;   // instead of a label's column
    static constexpr int kSlotPacks = (K + 1) * kWarp;   // from one slot of the buffers to the next one
    static constexpr uint32_t kSlotColumns = kWarp * V;  // of one stream

    CAMKD_DEVICE EvenRows(const Group& group) : group_(group) {}

    CAMKD_DEVICE int count() const { return int(group_.launch.args.N); }
    // From a row to the one that takes its place in the buffers.
    CAMKD_DEVICE int step() const { return group_.launch.groups * group_.rows_per_group(); }
    // Vectors of a row that this lane has. In the last slot of a warp some lanes have none.
    CAMKD_DEVICE int held() const {
        return int((uint32_t(group_.launch.C) / V + kWarp - 1 - uint32_t(group_.lane())) / kWarp);
    }

    // Rows beyond the last one count as ignored.
    CAMKD_DEVICE int64_t label_of(int row) const {
        const RowLossArgs& args = group_.launch.args;
        return row < count() ? args.target[row] : args.formula.ignore_index;
    }
    CAMKD_DEVICE int column_of(int64_t label) const {
        if (label == group_.launch.args.formula.ignore_index) return kIgnored;
        return uint64_t(label) < uint64_t(group_.launch.C) ? int(label) : kInvalid;
    }

    // Where the buffers of the warp have a column of the student; at() reads it, and that of stream k.
    CAMKD_DEVICE const T* in_buffer(const Pack* buffer, int column) const {
        const uint32_t slot = uint32_t(column) / kSlotColumns;
        return reinterpret_cast<const T*>(buffer - group_.lane()) + slot * (kSlotPacks * V) +
               uint32_t(column) % kSlotColumns;
    }
    static CAMKD_DEVICE float at(const T* place, int k) {
        return load_element(reinterpret_cast<const char*>(place + k * int(kSlotColumns)), 0, kDtype);
    }
    // Whether this lane has a column.
    CAMKD_DEVICE bool has(int column) const { return uint32_t(column) % kSlotColumns / V == uint32_t(group_.lane()); }

    // Starts the copies of a row.
    CAMKD_DEVICE void fetch(int row, Pack* buffer) const {
        const char* from[K + 1];
#pragma unroll
        for (int k = 0; k <= K; ++k) from[k] = address_of(k, row);
        const int slots = held();
#pragma unroll 1
        for (int i = 0; i < slots; ++i) {
#pragma unroll
            for (int k = 0; k <= K; ++k) copy_async(buffer + i * kSlotPacks + k * kWarp, from[k] + i * kVectorStride);
        }
    }

    // Writes the gradient of a row but for the label's column. With `more`, copies row `next` into the slots.
    template <int P, bool more>
    CAMKD_DEVICE void write_gradient(const FixedKRow<K>& numbers, int row, int next, Pack* slot, int slots) const {
        const char* from[K + 1];
#pragma unroll
        for (int k = 0; k <= K; ++k) from[k] = more ? address_of(k, next) : nullptr;
        write_fixed_k_slots<T, K, P, more>(numbers, group_.temperature().scale, slot, slots, from,
                                           gradient_of(row) + lane_bytes());
    }

    // Writes the gradient of an ignored row.
    CAMKD_DEVICE void write_zeros(int row) const {
        char* const to = gradient_of(row) + lane_bytes();
        for (int i = 0; i < held(); ++i) store_pack(to + i * kVectorStride, Pack{});
    }

    CAMKD_DEVICE char* gradient_of(int row) const {
        return static_cast<char*>(group_.launch.args.grad_student) + row_bytes(row, uint32_t(group_.launch.C));
    }

  private:
    // This lane's first vector of a row.
    CAMKD_DEVICE const char* address_of(int k, int row) const {
        const Matrix& stream = group_.launch.args.streams[k];
        return static_cast<const char*>(stream.data) + (row_bytes(row, uint32_t(stream.stride_inner)) + lane_bytes());
    }
    static CAMKD_DEVICE uint64_t row_bytes(int row, uint32_t stride) {
        return uint64_t(uint32_t(row) * uint32_t(sizeof(T))) * stride;
    }
    CAMKD_DEVICE uint32_t lane_bytes() const { return uint32_t(group_.lane()) * uint32_t(sizeof(Pack)); }

    const Group group_;
};

}  // namespace camkd::cuda
