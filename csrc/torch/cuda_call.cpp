// SPDX-License-Identifier: Apache-2.0
#include "cuda_call.h"

#include <string>

// Exported by libtorch_cuda alone: weak, so that this library loads into a torch without CUDA,
// where it is null.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fomoe::binding {
namespace {

using torch::headeronly::DeviceType;
using torch::stable::Device;

constexpr int kLowestComputeCapability = 80;

std::string name_of(const Device& device) {
  switch (device.type()) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::Meta:
      return "meta";
    case DeviceType::CUDA:
      return "cuda:" + std::to_string(device.index());
    default:
      return "another device";
  }
}

/// Index of the CUDA device that the arguments are on.
int32_t device_of(const char* op, std::initializer_list<Argument> arguments) {
  const Argument* first = nullptr;
  for (const Argument& argument : arguments) {
    if (!argument.tensor) continue;
    if (!first) first = &argument;
    const Device device = argument.tensor->device(), expected = first->tensor->device();
    check(device == expected, "fomoe::", op, ": ", argument.name, " must be on the device of ",
          first->name, ", ", name_of(expected), ", got ", name_of(device));
  }
  check(kHasCudaKernels, "fomoe::", op,
        ": this build of fomoe has no CUDA kernels; install it again with nvcc on PATH "
        "(FOMOE_CUDA=ON), or move the tensors to the CPU");
  check(first->tensor->is_cuda(), "fomoe::", op, ": ", first->name,
        " must be on a CUDA device, got ", name_of(first->tensor->device()));
  return first->tensor->get_device_index();
}

int checked_compute_capability(const char* op) {
  const int capability = cuda_compute_capability();
  check(capability >= kLowestComputeCapability, "fomoe::", op,
        ": the CUDA kernels need a device of compute capability 8.0 or newer, got ",
        capability / 10, ".", capability % 10);
  return capability;
}

cuda::Stream current_stream(const char* op, int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "fomoe::", op,
        ": the installed torch has no CUDA support; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

}  // namespace

CudaCall::CudaCall(const char* op, std::initializer_list<Argument> arguments)
    : CudaCall(op, device_of(op, arguments)) {}

CudaCall::CudaCall(const char* op, int32_t device_index)
    : guard_(device_index),
      compute_capability_(checked_compute_capability(op)),
      stream_(current_stream(op, device_index)) {}

}  // namespace fomoe::binding
