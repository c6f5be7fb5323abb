// The parts of DLPack's ABI (dmlc/dlpack 1.3, major version 1) by which C++ code exchanges tensors with torch without
// its headers. Layouts as in dlpack.h, names ours. torch exports the functions as
// `torch.Tensor.__dlpack_c_exchange_api__`.
#pragma once

#include <cstdint>

namespace camkd::dlpack {

struct Version {
    uint32_t major, minor;
};

enum class DeviceType : int32_t { cpu = 1, cuda = 2 };

struct Device {
    DeviceType type;
    int32_t index;

    bool operator==(const Device& o) const { return type == o.type && index == o.index; }
};

enum class TypeCode : uint8_t { signed_integer = 0, floating = 2, bfloat = 4 };

struct DataType {
    TypeCode code;
    uint8_t bits;
    uint16_t lanes;

    bool operator==(const DataType& o) const { return code == o.code && bits == o.bits && lanes == o.lanes; }
};

constexpr DataType kFloat32{TypeCode::floating, 32, 1}, kFloat16{TypeCode::floating, 16, 1};
constexpr DataType kBFloat16{TypeCode::bfloat, 16, 1}, kInt64{TypeCode::signed_integer, 64, 1};

// Strides count elements; `shape` and `strides` belong to the owner of the tensor.
struct Tensor {
    void* data;
    Device device;
    int32_t dimensions;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

// A tensor whose ownership is passed on; the last owner calls `deleter`.
struct ManagedTensor {
    Version version;
    void* context;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// Functions with Python objects need the GIL. They return 0, or -1 with a Python error set.
struct ExchangeApi {
    Version version;
    ExchangeApi* older;
    int (*allocate)(Tensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
    int (*take)(void* object, ManagedTensor** out);
    int (*give)(ManagedTensor*, void** object);
    int (*look)(void* object, Tensor* out);  // borrows: valid while the object lives; may be null
    int (*stream)(DeviceType, int32_t, void**);
};

}  // namespace camkd::dlpack
