// The device of the calls that take CUDA tensors.
#pragma once

#include "../cuda/api.h"
#include "dlpack.h"

namespace camkd::cuda {

#ifdef CAMKD_DEVICE_HEADER
constexpr auto kDevice = dlpack::DeviceType::cpu;  // the emulated device uses the host's memory
#else
constexpr auto kDevice = dlpack::DeviceType::cuda;
#endif

// Makes the device of a call the current one while this lives.
class OnDevice {
  public:
    explicit OnDevice(const dlpack::Device& device) : before_(exchange_device(device.index)) {}
    OnDevice(const OnDevice&) = delete;
    ~OnDevice() { return_to_device(before_); }

  private:
    int before_;
};

}  // namespace camkd::cuda
