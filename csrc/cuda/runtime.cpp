#include "runtime.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace camkd::cuda {
namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("camkd_fast: ") + what + ": " + cudaGetErrorString(status));
}

int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

Limits read_limits(int device) {
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
    limits.least_cooperative = limits.cluster > 1 && read(cudaDevAttrCooperativeLaunch) ? kLeastCooperative : 0;
    limits.pipeline_warps = limits.cluster > 1 ? kPipelineWarps : 0;
    return limits;
}

cudaLaunchConfig_t native_config(const LaunchConfig& config, void* stream, cudaLaunchAttribute* attribute) {
    // At most one attribute: blocks of clusters need not run at once
    cudaLaunchConfig_t native{};
    const int64_t row = config.group > 0 ? config.group : config.blocks;
    native.gridDim = dim3(unsigned(row), unsigned(config.blocks / row));
    native.blockDim = dim3(unsigned(config.threads));
    native.dynamicSmemBytes = size_t(config.shared);
    native.stream = static_cast<cudaStream_t>(stream);
    if (config.cluster > 1) {
        attribute->id = cudaLaunchAttributeClusterDimension;
        attribute->val.clusterDim.x = unsigned(config.cluster);
        attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    } else if (config.together) {
        attribute->id = cudaLaunchAttributeCooperative;
        attribute->val.cooperative = 1;
    }
    if (config.cluster > 1 || config.together) {
        native.attrs = attribute;
        native.numAttrs = 1;
    }
    return native;
}

}  // namespace

int exchange_device(int index) {
    const int before = current_device();
    if (before != index) check(cudaSetDevice(index), "cudaSetDevice");
    return before;
}

void return_to_device(int index) noexcept {
    int now = index;
    if (cudaGetDevice(&now) == cudaSuccess && now != index) cudaSetDevice(index);
}

const Limits& device_limits() {
    static std::mutex mutex;
    static std::map<int, Limits> cache;
    const int device = current_device();
    std::lock_guard<std::mutex> lock(mutex);
    auto at = cache.find(device);
    if (at == cache.end()) at = cache.emplace(device, read_limits(device)).first;
    return at->second;
}

int64_t resident_blocks_of(const void* kernel, const LaunchConfig& config) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int, int>, int64_t> cache;
    const auto key = std::make_tuple(current_device(), kernel, config.threads, config.cluster, config.shared);
    std::lock_guard<std::mutex> lock(mutex);
    auto at = cache.find(key);
    if (at != cache.end()) return at->second;
    // The maximum of the device, so that the order of launches from different threads does not matter
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits().shared_per_block),
          "shared memory of a kernel");
    // Logits bypass L1, so the memory that L1 and shared memory divide serves better for more blocks
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "carve-out of a kernel");
    int count = 0;
    if (config.cluster > 1) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of a kernel");
        cudaLaunchAttribute attribute{};
        LaunchConfig one = config;
        one.blocks = config.cluster;
        const cudaLaunchConfig_t native = native_config(one, nullptr, &attribute);
        if (cudaOccupancyMaxActiveClusters(&count, kernel, &native) != cudaSuccess) {
            cudaGetLastError();  // the device refuses this size, which is no error here: clear it
            count = 0;
        }
        count *= config.cluster;
    } else {
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, config.threads, size_t(config.shared)),
              "occupancy of a kernel");
        count *= device_limits().multiprocessors;
    }
    cache[key] = count;
    return count;
}

void launch_address(const void* kernel, const LaunchConfig& config, void* launch, const LaunchOptions& options) {
    if (config.blocks < 1) throw std::logic_error("launch of " + std::to_string(config.blocks) + " blocks");
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t native = native_config(config, options.stream, &attribute);
    void* arguments[] = {launch};
    check(cudaLaunchKernelExC(&native, kernel, arguments), "launch");
}

void* address_of_variable(const void* variable) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, void*> cache;
    std::lock_guard<std::mutex> lock(mutex);
    void*& address = cache[{current_device(), variable}];
    if (!address) check(cudaGetSymbolAddress(&address, variable), "address of a variable");
    return address;
}

int launch_slot(const LaunchOptions& options, SlotPool pool, int slots) {
    static std::mutex mutex;
    static std::map<std::pair<SlotPool, int>, int> taken;  // of each device
    static std::map<std::tuple<SlotPool, int, void*>, int> of_stream;
    const auto stream = static_cast<cudaStream_t>(options.stream);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
        cudaGetLastError();  // the legacy stream while another one records; the launch will say so
        return -1;
    }
    if (stream == cudaStreamPerThread) return -1;  // one handle for a stream of every thread
    const int device = current_device();
    std::lock_guard<std::mutex> lock(mutex);
    int& last = taken[{pool, device}];
    const auto next = [&] { return last < slots ? last++ : -1; };
    if (status != cudaStreamCaptureStatusNone) return next();
    const auto key = std::make_tuple(pool, device, options.stream);
    const auto at = of_stream.find(key);
    return at != of_stream.end() ? at->second : of_stream[key] = next();
}

}  // namespace camkd::cuda
