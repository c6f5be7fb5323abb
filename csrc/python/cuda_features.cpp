// The feature loss and the confidence weights of CUDA tensors, in one crossing each from Python, on the current stream.
#include "module.h"

#include "feature_functions.h"
#include "on_device.h"

namespace py = pybind11;
using namespace camkd::python;

namespace camkd::cuda {
namespace {

struct OnCuda {
    static constexpr int kOptions = 1;  // debug
    static constexpr int64_t kColumns = kMostColumns, kFeatureScratch = kFeatureParts;
    static constexpr bool kCounts = false;  // the host does not read labels

    using Current = OnDevice;

    dlpack::Device device{};
    LaunchOptions options{};

    bool read(PyObject* const* from, const dlpack::Device& of_call) {
        if (of_call.type != kDevice) return false;
        device = of_call;
        options = {tensors::current_stream(device), from[0] == Py_True};
        return true;
    }
    py::object make(const int64_t* shape, int dimensions, dlpack::DataType dtype, void*& data) const {
        return tensors::make_on(device, shape, dimensions, dtype, data);
    }
    tensors::Memory allocate(int64_t elements, dlpack::DataType dtype) const {
        return tensors::allocate_on(device, elements, dtype);
    }
    bool count(const ConfidenceArgs&, int64_t&) const { return true; }
    void set(const Factor& factor, float& number, const float*& address) const {
        number = float(factor.number);
        address = factor.address;
    }

    void confidence_forward(const ConfidenceArgs& args) const { cuda::confidence_forward(args, options); }
    void confidence_backward(const ConfidenceArgs& args) const { cuda::confidence_backward(args, options); }
    void features(const FeatureArgs& args) const { cuda::features(args, options); }
    void scale_rows(const ScaleRowsArgs& args) const { cuda::scale_rows(args, options); }
};

using Functions = FeatureFunctions<OnCuda>;

PyMethodDef methods[] = {fast("cuda_confidence_weights", Functions::confidence_weights),
                         fast("cuda_confidence_gradients", Functions::confidence_gradients),
                         fast("cuda_whole_feature_loss", Functions::whole_feature_loss),
                         fast("cuda_feature_gradients", Functions::feature_gradients),
                         fast("cuda_feature_loss_and_grad", Functions::feature_loss_and_grad),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_cuda_features(py::module_& m) {
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace camkd::cuda
