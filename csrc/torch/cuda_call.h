// SPDX-License-Identifier: Apache-2.0
// What a binding does around a CUDA kernel. The bindings are compiled into every binary; where the
// CUDA kernels are not, their calls are discarded and CudaCall refuses.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>

#include "fomoe/cuda.h"
#include "fomoe/kernel_path.h"
#include "tensor_args.h"

namespace fomoe::binding {

#ifdef FOMOE_WITH_CUDA
inline constexpr bool kHasCudaKernels = true;
#else
inline constexpr bool kHasCudaKernels = false;
#endif

/// A tensor argument by name; an optional one may be missing.
struct Argument {
  Argument(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const std::optional<Tensor>& tensor)
      : name(name), tensor(tensor ? &*tensor : nullptr) {}

  const char* name;
  const Tensor* tensor;
};

/// One call of an op on a CUDA device, which is the current one while this lives.
class CudaCall {
 public:
  /// Throws unless all of the arguments are on one CUDA device that runs our kernels.
  CudaCall(const char* op, std::initializer_list<Argument> arguments);

  /// torch's current stream on the device.
  cuda::Stream stream() const { return stream_; }

  /// The matrix kernels for these operands on this device.
  KernelPath path(const ProductOperands& operands) const {
    return choose_path(compute_capability_, operands);
  }

 private:
  CudaCall(const char* op, int32_t device_index);

  torch::stable::accelerator::DeviceGuard guard_;
  int compute_capability_;
  cuda::Stream stream_;
};

}  // namespace fomoe::binding
