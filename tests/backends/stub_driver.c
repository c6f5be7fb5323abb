// A CUDA driver that runs nothing and records the last launch, so that Triton's launchers work without a GPU.
#include <stdint.h>
#include <string.h>

#include "cuda.h"

static int expected, sizes[128], launches;
static uint64_t values[128], config[6];

// The bytes of each parameter of the next launches.
void stub_expect(int count, const int* bytes) {
    expected = count;
    memcpy(sizes, bytes, count * sizeof(int));
}
int stub_launches(void) {
    return launches;
}
uint64_t stub_parameter(int i) {
    return values[i];
}
// Grid (3), threads, shared memory, stream.
uint64_t stub_config(int i) {
    return config[i];
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void** extra) {
    const uint64_t of_launch[] = {c->gridDimX,  c->gridDimY,       c->gridDimZ,
                                  c->blockDimX, c->sharedMemBytes, (uint64_t)(uintptr_t)c->hStream};
    memcpy(config, of_launch, sizeof config);
    for (int i = 0; i < expected; ++i) {
        values[i] = 0;
        memcpy(&values[i], parameters[i], sizes[i]);
    }
    ++launches;
    return CUDA_SUCCESS;
}

// Triton asks for these while it loads a kernel.
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return cuCtxGetCurrent(context);
}
CUresult cuDeviceGet(CUdevice* device, int i) {
    *device = i;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    *value = 227 * 1024;  // most of them are sizes of shared memory
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    *module = (CUmodule)1;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = (CUfunction)1;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* address, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr*)address = pointer;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return CUDA_SUCCESS;
}

// Linked, not called.
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuDriverGetVersion(int* version) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = "the stub does not support it";
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    return CUDA_SUCCESS;
}
