// What one thread does with the vectors of a row that it keeps in its stash: maxima, sums, residual.
//
// The stash is shared memory that nobody else looks at: the thread copies its vectors there asynchronously and is free
// to fetch what comes next into a slot as soon as it is done with it, without any barrier.
#pragma once

#include "rows.cuh"

namespace camkd::cuda {

constexpr float kLog2E = 1.4426950408889634f;
// Teachers whose sums one sweep keeps in registers, five numbers each. More teachers take another sweep.
constexpr int kTeacherGroup = 4;

using State = StreamState<float>;

// A maximum to subtract: where no finite logit was seen any will do, every exponential is 0.
CAMKD_DEVICE float finite(float max) {
    return max == -INFINITY ? 0.0f : max;
}

// e^{x / T} as 2^{x scale}; e^x by multiplications where T is 1, 2 or 4 (`power`), and else (0) by a second
// exponential. The maximum is subtracted before the scale: a large common offset of a row must not cost accuracy.
struct Temperature {
    float scale;
    int power;

    template <int V>
    CAMKD_DEVICE void exps(const float (&d)[V], float (&e)[V]) const {
#pragma unroll
        for (int j = 0; j < V; ++j) e[j] = exp2_fast(d[j] * scale);
    }
    // e^{x/T} becomes e^x.
    template <int V>
    CAMKD_DEVICE void to_one(const float (&d)[V], float (&e)[V]) const {
        if (power == 0) {
#pragma unroll
            for (int j = 0; j < V; ++j) e[j] = exp2_fast(d[j] * kLog2E);
        }
        if (power >= 2) {
#pragma unroll
            for (int j = 0; j < V; ++j) e[j] *= e[j];
        }
        if (power == 4) {
#pragma unroll
            for (int j = 0; j < V; ++j) e[j] *= e[j];
        }
    }
};

// Slot i of stream k; one slot of all threads is contiguous, so that no two of them meet in a bank.
struct Stash {
    Pack* mine;
    int slots, stride;  // slots per stream, threads of the block

    CAMKD_DEVICE Pack* slot(int k, int i) const { return mine + int64_t(k * slots + i) * stride; }
};

// The vectors of one row that lie in slots begin .. begin + count: vector(i) for slot begin + i.
struct Batch {
    Columns columns;
    int first, stride;  // vector(i) = first + i * stride
    int begin, count;

    CAMKD_DEVICE int vector(int i) const { return first + i * stride; }
    CAMKD_DEVICE bool holds(int i) const { return vector(i) < columns.vectors; }
};

// Starts copying vector(i) of every stream.
template <class T>
CAMKD_DEVICE void fetch(const Stash& stash, const Batch& batch, int i, const Matrix* streams,
                        const char* const* addresses, int K) {
    if (!batch.holds(i)) return;
    const int v = batch.vector(i);
    const bool whole = whole_vector<T>(batch.columns, v);
    for (int k = 0; k <= K; ++k) {
        Pack* slot = stash.slot(k, batch.begin + i);
        if (whole)
            copy_async(slot, vector_address<T>(addresses[k], batch.columns, v));
        else
            *slot = gather<T>(addresses[k], streams[k].dtype, batch.columns, v, -INFINITY);
    }
}

template <class T>
CAMKD_DEVICE float stash_max(const Stash& stash, const Batch& batch, int k) {
    Pack top = lowest_pack<T>();
    for (int i = 0; i < batch.count; ++i)
        if (batch.holds(i)) top = max_pack<T>(top, *stash.slot(k, batch.begin + i));
    return highest<T>(top);
}

// Sums over the thread's vectors relative to the maxima in `states`, which they replace there once the warp has met.
// `after(i)` is called when slot begin + i has been read for the last time.
template <class T, class After>
CAMKD_DEVICE void stash_sums(const Stash& stash, const Batch& batch, int K, bool entropy, Temperature temperature,
                             int lane, State* states, After after) {
    constexpr int V = kVector<T>;
    const float student_max = finite(states[0].max);
    for (int first = 1; first <= K; first += kTeacherGroup) {
        State student, teachers[kTeacherGroup];
#pragma unroll
        for (int g = 0; g < kTeacherGroup; ++g)
            if (first + g <= K) teachers[g].max = finite(states[first + g].max);
        for (int i = 0; i < batch.count; ++i) {
            if (batch.holds(i)) {
                float s[V], e[V];
                Elements<T>::unpack(*stash.slot(0, batch.begin + i), s);
#pragma unroll
                for (int j = 0; j < V; ++j) s[j] -= student_max;
                if (first == 1) {
                    temperature.exps(s, e);
#pragma unroll
                    for (int j = 0; j < V; ++j) student.sum_t += e[j];
                    temperature.to_one(s, e);
#pragma unroll
                    for (int j = 0; j < V; ++j) student.sum_1 += e[j];
                }
#pragma unroll
                for (int g = 0; g < kTeacherGroup; ++g) {
                    if (first + g > K) continue;
                    State& teacher = teachers[g];
                    float z[V];
                    Elements<T>::unpack(*stash.slot(first + g, batch.begin + i), z);
#pragma unroll
                    for (int j = 0; j < V; ++j) z[j] -= teacher.max;
                    temperature.exps(z, e);
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        teacher.sum_t += e[j];
                        // Probability 0 contributes 0, even where the student is -inf and the difference infinite.
                        if (e[j] > 0) teacher.cross += e[j] * (z[j] - s[j]);
                    }
                    temperature.to_one(z, e);
#pragma unroll
                    for (int j = 0; j < V; ++j) teacher.sum_1 += e[j];
                    if (entropy) {
#pragma unroll
                        for (int j = 0; j < V; ++j)
                            if (e[j] > 0) teacher.entropy += e[j] * z[j];
                    }
                }
            }
            if (first + kTeacherGroup > K) after(i);
        }
        auto put = [&](State& to, float x, float State::* number) {
            x = warp_sum(x);
            if (lane == 0) to.*number = x;
        };
        if (first == 1) {
            put(states[0], student.sum_t, &State::sum_t);
            put(states[0], student.sum_1, &State::sum_1);
        }
#pragma unroll
        for (int g = 0; g < kTeacherGroup; ++g) {
            if (first + g > K) continue;
            State& to = states[first + g];
            put(to, teachers[g].sum_t, &State::sum_t);
            put(to, teachers[g].sum_1, &State::sum_1);
            put(to, teachers[g].cross, &State::cross);
            put(to, teachers[g].entropy, &State::entropy);
        }
    }
}

// Vector(i) of the residual. `label` is the vector-aligned position of the label, outside every vector for none.
template <class T>
CAMKD_DEVICE void residual_vector(const Stash& stash, const Batch& batch, int i, int K, Temperature temperature,
                                  const RowSums<float>* sums, const ResidualCoefficients<float>& coefficients,
                                  int64_t label, float label_coefficient, float (&out)[kVector<T>]) {
    constexpr int V = kVector<T>;
    float x[V], e[V];
    Elements<T>::unpack(*stash.slot(0, batch.begin + i), x);
    const float student_max = finite(sums[0].max);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] -= student_max;
    temperature.exps(x, e);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = coefficients.student_t * e[j];
    temperature.to_one(x, e);
    for (int k = 0; k < K; ++k) {
        const float coefficient = coefficients.teacher[k];
        // Weight 0 drops the teacher, even one whose logits are NaN.
        if (coefficient == 0) continue;
        const float teacher_max = finite(sums[k + 1].max);
        Elements<T>::unpack(*stash.slot(k + 1, batch.begin + i), x);
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] -= coefficient * exp2_fast((x[j] - teacher_max) * temperature.scale);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] *= coefficients.student_1;
    const int64_t at = label - int64_t(batch.vector(i)) * V;
    if (at >= 0 && at < V) {
        // Apart from the soft part: beside a label's 1 each of K small terms would be rounded to its scale.
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (j == at) e[j] -= label_coefficient;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] += e[j];
}

// The states of up to 32 parts of a row, one to a lane, become one: load(lane, k) and store(k, state) for each stream.
template <class Load, class Store>
CAMKD_DEVICE void merge_lanes(int lane, int parts, int K, float inverse_t, Load load, Store store) {
    const bool live = lane < parts;
    State state = live ? load(lane, 0) : State();
    const float old_student = state.max, student = warp_max(old_student);
    move_student(state, student, inverse_t);
    for (int k = 0; k <= K; ++k) {
        if (k > 0) {
            state = live ? load(lane, k) : State();
            const float max = warp_max(state.max);
            move_teacher(state, max, old_student, student, inverse_t);
        }
        state.sum_t = warp_sum(state.sum_t);
        state.sum_1 = warp_sum(state.sum_1);
        if (k > 0) {
            state.cross = warp_sum(state.cross);
            state.entropy = warp_sum(state.entropy);
        }
        if (lane == 0) store(k, state);
    }
}

}  // namespace camkd::cuda
