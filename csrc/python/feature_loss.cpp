// The feature loss and the confidence weights of CPU tensors, in one crossing each from Python.
#include "module.h"

#include "../cpu/row_call.h"
#include "feature_functions.h"

namespace py = pybind11;
using namespace camkd::cpu;

namespace camkd::python {
namespace {

struct OnCpu {
    static constexpr int kOptions = 2;  // threads, poison
    static constexpr int64_t kColumns = INT64_MAX, kFeatureScratch = 0;
    static constexpr bool kCounts = true;  // counts the labels before the kernels run

    struct Current {
        explicit Current(const dlpack::Device&) {}
    };

    int threads = 1;
    bool poison = false;

    bool read(PyObject* const* options, const dlpack::Device& device) {
        int64_t most;
        if (device.type != dlpack::DeviceType::cpu || !arguments::read_integer(options[0], most)) return false;
        threads = int(most);
        poison = options[1] == Py_True;
        return true;
    }
    py::object make(const int64_t* shape, int dimensions, dlpack::DataType dtype, void*& data) const {
        return tensors::make(shape, dimensions, dtype, poison, data);
    }
    tensors::Memory allocate(int64_t elements, dlpack::DataType dtype) const {
        return tensors::allocate(size_t(elements) * (dtype.bits / 8), poison);
    }
    bool count(const ConfidenceArgs& args, int64_t& valid) const {
        const LabelCount found = count_labels(args.target, args.second, args.N, args.C, args.ignore_index);
        valid = found.valid;
        return found.invalid < 0;
    }
    void set(const Factor& factor, float& number, const float*&) const { number = float(factor.on_host()); }

    void confidence_forward(const ConfidenceArgs& args) const {
        py::gil_scoped_release release;
        kernels().confidence_forward(args, threads);
    }
    void confidence_backward(const ConfidenceArgs& args) const {
        py::gil_scoped_release release;
        kernels().confidence_backward(args, threads);
    }
    void features(const FeatureArgs& args) const {
        py::gil_scoped_release release;
        kernels().features(args, threads);
    }
    void scale_rows(const ScaleRowsArgs& args) const {
        if (args.out == args.grad && args.factor[0] * args.number == 1.0f) return;
        py::gil_scoped_release release;
        kernels().scale_rows(args, threads);
    }
};

using Functions = FeatureFunctions<OnCpu>;

PyMethodDef feature_methods[] = {fast("confidence_weights", Functions::confidence_weights),
                                 fast("confidence_gradients", Functions::confidence_gradients),
                                 fast("whole_feature_loss", Functions::whole_feature_loss),
                                 fast("feature_gradients", Functions::feature_gradients),
                                 fast("feature_loss_and_grad", Functions::feature_loss_and_grad),
                                 {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_feature_loss(py::module_& m) {
    if (PyModule_AddFunctions(m.ptr(), feature_methods) != 0) throw py::error_already_set();
}

}  // namespace camkd::python
