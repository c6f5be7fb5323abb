// The host side of every launch: limits of the device, alignment of matrices, and the launch itself. tests/cuda/host/
// replaces the part that needs the CUDA runtime.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "api.h"
#include "elements.cuh"
#include "launch_table.h"

#ifdef CAMKD_LAUNCH_HEADER
#include CAMKD_LAUNCH_HEADER
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

namespace camkd::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("camkd_fast: ") + what + ": " + cudaGetErrorString(status));
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

inline Limits read_limits(int device) {
    auto read = [&](cudaDeviceAttr name) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
        return value;
    };
    Limits limits{};
    limits.multiprocessors = read(cudaDevAttrMultiProcessorCount);
    limits.shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    limits.shared_per_multiprocessor = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    limits.l2 = read(cudaDevAttrL2CacheSize);
    limits.cluster = read(cudaDevAttrClusterLaunch) ? largest_cluster(read(cudaDevAttrComputeCapabilityMajor)) : 1;
    limits.block_threads = kBlockThreads;
    return limits;
}

// Queries the driver once per device.
inline const Limits& device_limits() {
    static std::mutex mutex;
    static std::map<int, Limits> cache;
    const int device = current_device();
    std::lock_guard<std::mutex> lock(mutex);
    auto at = cache.find(device);
    if (at == cache.end()) at = cache.emplace(device, read_limits(device)).first;
    return at->second;
}

struct LaunchConfig {
    int64_t blocks;
    int threads, cluster, shared;
};

template <class Launch>
cudaLaunchConfig_t native_config(const LaunchConfig& config, void* stream, cudaLaunchAttribute* attribute) {
    cudaLaunchConfig_t native{};
    native.gridDim = dim3(unsigned(config.blocks));
    native.blockDim = dim3(unsigned(config.threads));
    native.dynamicSmemBytes = size_t(config.shared);
    native.stream = static_cast<cudaStream_t>(stream);
    if (config.cluster > 1) {
        attribute->id = cudaLaunchAttributeClusterDimension;
        attribute->val.clusterDim.x = unsigned(config.cluster);
        attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
        native.attrs = attribute;
        native.numAttrs = 1;
    }
    return native;
}

// Blocks of this launch that are resident at once on the current device; 0 if a cluster of this size never fits.
// Queries the driver once per configuration, and sets the kernel's attributes that the configuration needs.
template <class Launch>
int64_t resident_blocks(void (*kernel)(Launch), const LaunchConfig& config) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int, int>, int64_t> cache;
    const void* address = reinterpret_cast<const void*>(kernel);
    const auto key = std::make_tuple(current_device(), address, config.threads, config.cluster, config.shared);
    std::lock_guard<std::mutex> lock(mutex);
    auto at = cache.find(key);
    if (at != cache.end()) return at->second;
    // The maximum of the device, so that the order of launches from different threads does not matter
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits().shared_per_block),
          "shared memory of a kernel");
    // Logits bypass L1, so the memory that L1 and shared memory divide serves better for more blocks
    check(cudaFuncSetAttribute(address, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "carve-out of a kernel");
    int count = 0;
    if (config.cluster > 1) {
        check(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of a kernel");
        cudaLaunchAttribute attribute{};
        LaunchConfig one = config;
        one.blocks = config.cluster;
        const cudaLaunchConfig_t native = native_config<Launch>(one, nullptr, &attribute);
        if (cudaOccupancyMaxActiveClusters(&count, address, &native) != cudaSuccess) {
            cudaGetLastError();  // the device refuses this size, which is no error here: clear it
            count = 0;
        }
        count *= config.cluster;
    } else {
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, address, config.threads, size_t(config.shared)),
              "occupancy of a kernel");
        count *= device_limits().multiprocessors;
    }
    cache[key] = count;
    return count;
}

template <class Launch>
void launch_kernel(void (*kernel)(Launch), const LaunchConfig& config, const Launch& launch,
                   const LaunchOptions& options) {
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t native = native_config<Launch>(config, options.stream, &attribute);
    void* arguments[] = {const_cast<Launch*>(&launch)};
    check(cudaLaunchKernelExC(&native, reinterpret_cast<const void*>(kernel), arguments), "launch");
}

}  // namespace camkd::cuda

#endif

namespace camkd::cuda {

// True if each row has the same offset from a 16-byte boundary in all these matrices of N rows, S per outer stride.
inline bool aligned_alike(const Matrix* const* matrices, int count, int64_t N, int64_t S) {
    auto bytes = [](const Matrix& m, int64_t elements) {
        return uint64_t(elements) * (m.dtype == DType::f32 ? 4 : 2) % sizeof(Pack);
    };
    auto address = [](const Matrix& m) { return reinterpret_cast<uintptr_t>(m.data) % sizeof(Pack); };
    const Matrix& one = *matrices[0];
    for (int i = 1; i < count; ++i) {
        const Matrix& other = *matrices[i];
        if (other.dtype != one.dtype || address(other) != address(one)) return false;
        // The stride of a dimension of size 1 is never used, and arbitrary in torch
        if (S > 1 && bytes(other, other.stride_inner) != bytes(one, one.stride_inner)) return false;
        if (N > S && bytes(other, other.stride_outer) != bytes(one, one.stride_outer)) return false;
    }
    return true;
}

inline bool aligned_alike(std::initializer_list<const Matrix*> matrices, int64_t N, int64_t S) {
    return aligned_alike(matrices.begin(), int(matrices.size()), N, S);
}

// A contiguous (N, C) output.
inline Matrix dense(const void* data, int64_t C, int64_t S, DType dtype) {
    return {data, S * C, C, dtype};
}

// Calls f(T{}) with the element type of the kernel for these dtypes; float serves mixed dtypes too.
template <class F>
void with_element(DType dtype, bool mixed, F f) {
    if (mixed || dtype == DType::f32)
        f(float{});
    else if (dtype == DType::bf16)
        f(bf16{});
    else
        f(f16{});
}

}  // namespace camkd::cuda
