// One thread's vectors of a row, as logits: of each vector the student's, then those of all teachers.
#pragma once

#include "../api.h"
#include "../batch_mean.cuh"
#include "../exponentials.cuh"
#include "../rows.cuh"

namespace camkd::cuda {

struct FormulaLaunch {
    RowLossArgs args;
    int C;       // columns fit 32 bits on the device
    bool debug;  // assert that labels are valid
    Temperature temperature;
    bool warp_per_row;
    bool wide_in, wide_out;    // as in RowAccess
    BatchCounters* counters;   // for the numbers of a minibatch; null: by other launches, or not at all
    int64_t labels_per_block;  // with counters, how many labels each block counts
};

// A LogitMap with one multiplication before the tanh.
struct LogitCurve {
    float scale, softcap, inner;

    CAMKD_DEVICE LogitCurve(const LogitMap& map)
        : scale(map.scale), softcap(map.softcap), inner(capped() ? map.scale / map.softcap : map.scale) {}
    CAMKD_DEVICE bool capped() const { return softcap != 0; }
    CAMKD_DEVICE float operator()(float x) const { return capped() ? softcap * std::tanh(inner * x) : scale * x; }
    // d logit / dx; from the cosh, because 1 - tanh^2 would cancel near the cap.
    CAMKD_DEVICE float slope(float x) const {
        if (!capped()) return scale;
        const float inverse = 1.0f / std::cosh(inner * x);
        return scale * inverse * inverse;
    }
};

// Vectors are taken in the order of the row; while one is used, the next one is loaded. By coherent loads, because the
// gradient may be written over the student's logits.
template <class T>
class RowReader {
    static constexpr int V = kVector<T>;

  public:
    CAMKD_DEVICE RowReader(const FormulaLaunch& launch, const ThreadGroup& group, const char* const* addresses)
        : launch_(launch),
          addresses_(addresses),
          stride_(group.members),
          columns_(columns_of<T>(launch.C, launch.wide_in, addresses[0])) {
        if (group.member < columns_.vectors) next_ = fetch(0, group.member);
    }

    CAMKD_DEVICE const Columns& columns() const { return columns_; }

    // Vector v of stream k.
    CAMKD_DEVICE Pack take(int k, int v) {
        const Pack taken = next_;
        const bool last = k == launch_.args.K;
        const int after = last ? v + stride_ : v;
        if (after < columns_.vectors) next_ = fetch(last ? 0 : k + 1, after);
        return taken;
    }

    // Its logits, -inf outside the row.
    CAMKD_DEVICE void logits(const Pack& pack, int k, int v, float (&x)[V]) const {
        Elements<T>::unpack(pack, x);
        if (!launch_.args.formula.maps) return;
        const LogitCurve curve(launch_.args.formula.logit_maps[k]);
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] = curve(x[j]);
        if (!curve.capped() || whole_vector(columns_, v)) return;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int c = v * V - columns_.phase + j;
            if (c < 0 || c >= columns_.C) x[j] = -INFINITY;
        }
    }
    CAMKD_DEVICE void take_logits(int k, int v, float (&x)[V]) { logits(take(k, v), k, v, x); }

  private:
    CAMKD_DEVICE Pack fetch(int k, int v) const {
        const char* const row = addresses_[k];
        if (whole_vector(columns_, v)) return load_pack_coherent(vector_address<T>(row, columns_, v));
        return gather<T>(row, launch_.args.streams[k].dtype, columns_, v, -INFINITY);
    }

    const FormulaLaunch& launch_;
    const char* const* const addresses_;  // of the row in each stream
    const int stride_;
    const Columns columns_;
    Pack next_{};
};

}  // namespace camkd::cuda
