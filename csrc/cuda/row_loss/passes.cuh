// The passes of one thread over its vectors of a row, in the row buffers: fetch, maxima, sums, gradient. These are the
// general passes, for any number of teachers, temperature, weighting and logits; fixed_k_passes.cuh has the fast path.
//
// A thread's part of the row buffers is shared memory that no other thread reads: the thread copies its vectors there
// asynchronously, and may refill a slot without a barrier as soon as it has used it.
#pragma once

#include "../exponentials.cuh"
#include "../rows.cuh"

namespace camkd::cuda {

// Teachers whose sums one pass keeps in registers, five numbers each; a fourth would spill. More teachers take more
// passes.
constexpr int kTeacherGroup = 3;

using State = StreamState<float>;

// slot(k, i) is vector slot i of stream k. The buffer of a warp is [slot][stream][lane]: lanes side by side avoid bank
// conflicts, and strides that depend on K only are part of the instructions.
struct RowBuffer {
    Pack* first;
    int streams;

    CAMKD_DEVICE Pack* slot(int k, int i) const { return first + (i * streams + k) * kWarp; }
    CAMKD_DEVICE int slot_stride() const { return streams * kWarp; }
};

// One thread's part of a row, or of a chunk of its columns: vector(i) lies in slot begin + i, for i < held <= count. A
// warp has consecutive vectors.
struct Chunk {
    Columns columns;
    int first;
    int begin, count, held;

    CAMKD_DEVICE int vector(int i) const { return first + i * kWarp; }
};

// The slots from begin up to end.
struct SlotRange {
    int begin, end;
};

// The slots of a chunk whose vectors can be accessed in one instruction each.
CAMKD_DEVICE SlotRange whole_slots(const Columns& columns, const Chunk& chunk) {
    const int left = columns.first_whole + columns.whole - chunk.first;
    const int end = left > 0 ? (left + kWarp - 1) / kWarp : 0;
    return {chunk.first < columns.first_whole ? 1 : 0, end < chunk.held ? end : chunk.held};
}

// Starts the copy of vector(i) of every stream; whole_vector must hold for it.
template <class T>
CAMKD_DEVICE void fetch_whole(const RowBuffer& buffer, const Chunk& chunk, int i, const char* const* addresses, int K) {
    const int v = chunk.vector(i);
#pragma unroll
    for (int k = 0; k <= K; ++k)
        copy_async(buffer.slot(k, chunk.begin + i), vector_address<T>(addresses[k], chunk.columns, v));
}

// Copies vector(i) of every stream element by element, with -inf beyond the row.
template <class T>
CAMKD_DEVICE void fetch_elements(const RowBuffer& buffer, const Chunk& chunk, int i, const Matrix* streams,
                                 const char* const* addresses, int K) {
#pragma unroll 1
    for (int k = 0; k <= K; ++k)
        *buffer.slot(k, chunk.begin + i) =
            gather<T>(addresses[k], streams[k].dtype, chunk.columns, chunk.vector(i), -INFINITY);
}

template <class T>
CAMKD_DEVICE float general_max(const RowBuffer& buffer, const Chunk& chunk, int k) {
    Pack top = lowest_pack<T>();
#pragma unroll 2
    for (int i = 0; i < chunk.held; ++i) top = max_pack<T>(top, *buffer.slot(k, chunk.begin + i));
    return highest<T>(top);
}

// sum + e[0] + ... + e[V - 1], in this order.
template <int V>
CAMKD_DEVICE float add_all(const float (&e)[V], float sum) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum += e[j];
    return sum;
}

// One vector's part of sum e_z (u_z - u_s). Probability 0 contributes 0, even where the difference is infinite; that is
// checked only if the unchecked sum is NaN.
template <int V>
CAMKD_DEVICE float cross_term(const float (&e)[V], const float (&z)[V], const float (&s)[V]) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum = fmaf(e[j], z[j] - s[j], sum);
    if (sum != sum) {
        sum = 0;
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (e[j] > 0) sum = fmaf(e[j], z[j] - s[j], sum);
    }
    return sum;
}

// The sum of e^x over a vector, given its exponentials `e` at T. They become those at T = 1 or, for T = 2 and 4, their
// square roots. `reload` reads the logits again.
template <int V, class Reload>
CAMKD_DEVICE float sum_at_one(const Temperature& temperature, const float& max, bool exact, float (&e)[V],
                              Reload reload) {
    float sum = 0;
    if (temperature.power == 0) {
        float u[V];
        reload(u);
        Reference(max, kLog2E, exact).apply(kLog2E, max, u);
        exps(u, e);
    } else if (temperature.power == 4) {
#pragma unroll
        for (int j = 0; j < V; ++j) e[j] *= e[j];
    }
    if (temperature.power >= 2) {
        // The last multiplication is fused with the addition
#pragma unroll
        for (int j = 0; j < V; ++j) sum = fmaf(e[j], e[j], sum);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) sum += e[j];
    }
    return sum;
}

// sum + e^z z over a vector, given what sum_at_one leaves in `e`.
template <int V>
CAMKD_DEVICE float add_plogp(const Temperature& temperature, const float (&e)[V], const float (&z)[V], float sum) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const float e1 = temperature.power >= 2 ? e[j] * e[j] : e[j];
        if (e1 > 0) sum = fmaf(e1, z[j], sum);
    }
    return sum;
}

// Corrects the sums of a row, or of a part of it, for their reference, whose maximum is state.max. The maximum's own
// term is 1. With AnyRow it is taken out as it was added, with the error of the hardware's exponential, beside which
// the other terms of a nearly certain row would not be seen. Kernels of a fixed K pass only rows here whose label is
// far from the maximum, and would spill.
template <bool AnyRow>
CAMKD_DEVICE void correct_sums(float sumT, float sum1, const Reference& reference, const Temperature& temperature,
                               bool exact, State& state) {
    const float factor = reference.factor(), factor1 = temperature.factor1(reference, state.max, exact);
    if (AnyRow && state.max != -INFINITY) {
        const float own = reference.of_max(state.max, temperature.scale);
        state.sumT = fmaf(sumT - own, factor, 1.0f);
        state.sum1 = fmaf(sum1 - temperature.of_max1(own, state.max, exact), factor1, 1.0f);
    } else {
        state.sumT = sumT * factor;
        state.sum1 = sum1 * factor1;
    }
}

// Reduces the sums of a thread across the warp, corrects them for their reference, and stores them in lane 0.
template <bool AnyRow>
CAMKD_DEVICE void reduce_student(const State& of_thread, const Reference& reference, const Temperature& temperature,
                                 int lane, State& to) {
    const float sumT = warp_sum(of_thread.sumT), sum1 = warp_sum(of_thread.sum1);
    if (lane == 0) correct_sums<AnyRow>(sumT, sum1, reference, temperature, false, to);
}

template <bool AnyRow>
CAMKD_DEVICE void reduce_teacher(const State& of_thread, const Reference& student_reference,
                                 const Temperature& temperature, bool entropy, int lane, State& to) {
    const float sumT = warp_sum(of_thread.sumT), sum1 = warp_sum(of_thread.sum1);
    const float cross = warp_sum(of_thread.cross), plogp = warp_sum(of_thread.plogp);
    if (lane != 0) return;
    const Reference reference(to.max, temperature.scale, entropy);
    const float factor = reference.factor();
    const float factor1 = temperature.factor1(reference, to.max, entropy);
    correct_sums<AnyRow>(sumT, sum1, reference, temperature, entropy, to);
    // From scaled distances to logits
    to.cross =
        (cross - (reference.correction() - student_reference.correction()) * sumT) * (factor * temperature.inverse);
    to.plogp = (plogp - reference.correction() * sum1) * (factor1 * temperature.inverse);
}

// The warp's sums relative to the maxima in `states`, where they are stored. Entropies use exact distances from the
// maximum, because a nearly certain teacher's entropy is close to 0 and would show the error of `rest`. V columns at a
// time, because a general kernel would need more registers than there are for eight columns of four streams.
template <class T, int V, bool AnyRow>
CAMKD_DEVICE void general_sums(const RowBuffer& buffer, const Chunk& chunk, int K, bool entropy,
                               Temperature temperature, int lane, State* states) {
    const float scale = temperature.scale;
    const Reference student_reference(states[0].max, scale);
    for (int first = 1; first <= K; first += kTeacherGroup) {
        State student, teachers[kTeacherGroup];
        float at[kTeacherGroup];
        bool far = false;
#pragma unroll
        for (int g = 0; g < kTeacherGroup; ++g) {
            if (first + g > K) continue;
            const Reference reference(states[first + g].max, scale, entropy);
            at[g] = reference.at;
            far = far || reference.far();
        }
        // Sum over the vectors of this thread
        for (int i = 0; i < chunk.held; ++i) {
#pragma unroll 1
            for (int part = 0; part < kVector<T> / V; ++part) {
                const auto read = [&](int k, float (&x)[V]) {
                    Elements<T>::unpack_part(buffer.slot(k, chunk.begin + i), part, x);
                };
                float s[V], e[V];
                read(0, s);
                student_reference.apply(scale, states[0].max, s);
                if (first == 1) {
                    exps(s, e);
                    student.sumT = add_all(e, student.sumT);
                    student.sum1 +=
                        sum_at_one(temperature, states[0].max, false, e, [&](float (&x)[V]) { read(0, x); });
                }
#pragma unroll
                for (int g = 0; g < kTeacherGroup; ++g) {
                    if (first + g > K) continue;
                    State& teacher = teachers[g];
                    float z[V];
                    read(first + g, z);
                    if (far)
                        Reference(states[first + g].max, scale, entropy).apply(scale, states[first + g].max, z);
                    else
                        Reference::scale_from(at[g], scale, z);
                    exps(z, e);
                    teacher.sumT = add_all(e, teacher.sumT);
                    teacher.cross += cross_term(e, z, s);
                    teacher.sum1 += sum_at_one(temperature, states[first + g].max, entropy, e,
                                               [&](float (&x)[V]) { read(first + g, x); });
                    if (entropy) teacher.plogp = add_plogp(temperature, e, z, teacher.plogp);
                }
            }
        }
        // Reduce across the warp
        if (first == 1) reduce_student<AnyRow>(student, student_reference, temperature, lane, states[0]);
#pragma unroll
        for (int g = 0; g < kTeacherGroup; ++g) {
            if (first + g > K) continue;
            reduce_teacher<AnyRow>(teachers[g], student_reference, temperature, entropy, lane, states[first + g]);
        }
    }
}

// Vector(i) of the gradient. `label` is the element of the label's column, outside 0 .. V - 1 if it lies elsewhere. The
// coefficients include the factors of their streams' references.
template <class T, class Coefficients>
CAMKD_DEVICE void general_grad_vector(const RowBuffer& buffer, const Chunk& chunk, int i, int K,
                                      Temperature temperature, const Reference* references, const State* sums,
                                      const Coefficients& coefficients, int label, float label_coefficient,
                                      float (&out)[kVector<T>]) {
    constexpr int V = kVector<T>;
    float x[V], e[V];
    Elements<T>::unpack(*buffer.slot(0, chunk.begin + i), x);
    references[0].apply(temperature.scale, sums[0].max, x);
    exps(x, e);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = coefficients.studentT * e[j];
    for (int k = 0; k < K; ++k) {
        const float coefficient = coefficients.teacher[k];
        // Weight 0 drops even a teacher whose logits are NaN.
        if (coefficient == 0) continue;
        Elements<T>::unpack(*buffer.slot(k + 1, chunk.begin + i), x);
        references[k + 1].apply(temperature.scale, sums[k + 1].max, x);
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = fmaf(-coefficient, exp2_fast(x[j]), out[j]);
    }
    if (temperature.power == 0) {
        Elements<T>::unpack(*buffer.slot(0, chunk.begin + i), x);
        Reference(sums[0].max, kLog2E).apply(kLog2E, sums[0].max, x);
        exps(x, e);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) e[j] = temperature.raise(e[j]);
    }
    if (unsigned(label) < unsigned(V)) {
        // Soft and hard part separately: added to the label's 1, each of K small terms would be rounded to its scale.
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float hard = coefficients.student1 * e[j] - (j == label ? label_coefficient : 0.0f);
            out[j] += hard;
        }
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = fmaf(coefficients.student1, e[j], out[j]);
    }
}

// Merges the states of the parts of a row, which the lanes share: calls load(part, k) and store(k, state) for each
// stream.
template <class Load, class Store>
CAMKD_DEVICE void general_merge(int lane, int parts, int K, float inverseT, Load load, Store store) {
    float student = -INFINITY;
    for (int k = 0; k <= K; ++k) {
        State state;
        for (int part = lane; part < parts; part += kWarp) state.max = fmaxf(load(part, k).max, state.max);
        state.max = warp_max(state.max);
        if (k == 0) student = state.max;
        for (int part = lane; part < parts; part += kWarp) {
            State one = load(part, k);
            if (k == 0)
                move_student(one, student, inverseT);
            else
                move_teacher(one, state.max, load(part, 0).max, student, inverseT);
            state.sumT += one.sumT;
            state.sum1 += one.sum1;
            state.cross += one.cross;
            state.plogp += one.plogp;
        }
        state.sumT = warp_sum(state.sumT);
        state.sum1 = warp_sum(state.sum1);
        if (k > 0) {
            state.cross = warp_sum(state.cross);
            state.plogp = warp_sum(state.plogp);
        }
        if (lane == 0) store(k, state);
    }
}

}  // namespace camkd::cuda
