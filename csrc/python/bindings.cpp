// The Python module. Takes addresses and sizes, and calls the kernels without the GIL. No maths and no torch headers.
#include "../cpu/api.h"
#include "../cpu/output_memory.h"
#include "../cpu/row_call.h"
#include "arguments.h"
#include "cuda_build.h"  // made by cuda/cuda.cmake
#include "module.h"

namespace py = pybind11;
using namespace camkd;
using namespace camkd::cpu;
using namespace camkd::arguments;

namespace {

// Returns the sums of loss, hard and soft over the rows, added in order.
std::tuple<double, double, double> row_loss(const Shape& shape, const std::vector<MatrixTuple>& streams,
                                            uintptr_t target, const Second& second, const py::object& formula,
                                            const Weights& weights, uintptr_t row_stats, uintptr_t grad_student,
                                            float grad_scale, const ShardTuple& shard, int threads) {
    const RowLossArgs args =
        row_loss_args(shape, streams, target, second, formula, weights, row_stats, grad_student, grad_scale, shard);
    py::gil_scoped_release release;
    const auto sums = run_row_loss(args, threads);
    return {sums[0], sums[1], sums[2]};
}

void scale_rows(int64_t N, int64_t C, uintptr_t grad, uintptr_t out, int dtype, uintptr_t factor, int64_t factor_stride,
                int threads) {
    const ScaleRowsArgs args = scale_rows_args(N, C, grad, out, dtype, factor, factor_stride);
    py::gil_scoped_release release;
    kernels().scale_rows(args, threads);
}

void confidence_forward(const Shape& shape, const std::vector<MatrixTuple>& logits, uintptr_t target,
                        const Second& second, int64_t ignore_index, uintptr_t weights, uintptr_t ce, uintptr_t lse,
                        int threads) {
    const ConfidenceArgs args = confidence_forward_args(shape, logits, target, second, ignore_index, weights, ce, lse);
    py::gil_scoped_release release;
    kernels().confidence_forward(args, threads);
}

void confidence_backward(const Shape& shape, const std::vector<MatrixTuple>& logits, uintptr_t target,
                         const Second& second, uintptr_t lse, uintptr_t grad_ce, const std::vector<uintptr_t>& grads,
                         int threads) {
    const ConfidenceArgs args = confidence_backward_args(shape, logits, target, second, lse, grad_ce, grads);
    py::gil_scoped_release release;
    kernels().confidence_backward(args, threads);
}

void features(int64_t N, const std::vector<MapPair>& pairs, const Weights& weights, uintptr_t error, uintptr_t loss,
              const std::vector<uintptr_t>& grads, float scale, float grad_scale, int threads) {
    const FeatureArgs args = feature_args(N, pairs, weights, error, loss, grads, scale, grad_scale);
    py::gil_scoped_release release;
    kernels().features(args, threads);
}

// LabelCount
std::pair<int64_t, int64_t> label_counts(uintptr_t target, const Second& second, int64_t N, int64_t C,
                                         int64_t ignore_index) {
    const LabelCount found = count_labels(pointer<const int64_t>(target), second_labels(second), N, C, ignore_index);
    return {found.valid, found.invalid};
}

template <class T, size_t count>
py::tuple exported(const T (&values)[count]) {
    py::tuple out(count);
    for (size_t i = 0; i < count; ++i) out[i] = values[i];
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of camkd_fast; called only by camkd_fast.backends.";
    python::add_logit_loss(m);
    python::add_feature_loss(m);
    m.def("row_loss", &row_loss);
    m.def("scale_rows", &scale_rows);
    m.def("confidence_forward", &confidence_forward);
    m.def("confidence_backward", &confidence_backward);
    m.def("features", &features);
    m.def("count_labels", &label_counts);
    m.def("instruction_set", [] { return kernels().name; });
    m.attr("MAX_TEACHERS") = kMaxTeachers;
    m.attr("TEMPERATURE_POWERS") = exported(kTemperaturePowers);
    m.attr("FORMULA_FIELDS") = exported(kFormulaFields);
    m.attr("DTYPES") = exported(kDTypeNames);
    m.attr("WEIGHTINGS") = exported(kWeightingNames);
    m.attr("ROW_SUMS") = exported(kRowSumNames);
    m.attr("ROW_STATS") = exported(kRowStatNames);
    m.attr("SHARDS") = exported(kShardNames);
    m.attr("DIVERGENCES") = exported(kDivergenceNames);
    m.attr("RECYCLED_BYTES") = kRecycledBytes;
    m.attr("FEATURE_PARTS") = kFeatureParts;
    py::class_<OutputMemory>(m, "OutputMemory", py::buffer_protocol())
        .def(py::init<size_t>())
        .def_buffer([](OutputMemory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()), py::ssize_t(memory.bytes()));
        });
    // (whether there are CUDA kernels, their architectures or why there are none)
    m.def("cuda_build", [] { return std::make_pair(bool(CAMKD_CUDA), CAMKD_CUDA_BUILD); });
#if CAMKD_CUDA
    camkd::cuda::add_bindings(m);
#endif
}
