// SPDX-License-Identifier: Apache-2.0
#include "fomoe/kernel_path.h"

#include <algorithm>

namespace fomoe {

const char* name_of(KernelPath path) {
  switch (path) {
    case KernelPath::kSimple:
      return "simple";
    case KernelPath::kSm80:
      return "sm80";
    case KernelPath::kSm90:
      return "sm90";
  }
  return "";
}

const char* obstacle_to_tensor_cores(const ProductOperands& operands) {
  if (operands.dtype != DType::kBFloat16 && operands.dtype != DType::kFloat16) {
    return "the dtype is neither bfloat16 nor float16";
  }
  for (const void* array : operands.arrays) {
    if (reinterpret_cast<uintptr_t>(array) % 16 != 0) {
      return "an array does not begin at a multiple of 16 bytes";
    }
  }
  for (const int64_t width : operands.widths) {
    if (width % 8 != 0) return "a width is not a multiple of 8 elements";
  }
  return nullptr;
}

KernelPath choose_path(int compute_capability, const ProductOperands& operands) {
  if (obstacle_to_tensor_cores(operands)) return KernelPath::kSimple;
  return compute_capability == 90 ? KernelPath::kSm90 : KernelPath::kSm80;
}

bool is_decode(int64_t num_rows, int64_t num_experts) {
  return num_rows <= std::max<int64_t>(2 * num_experts, 16);
}

#ifndef FOMOE_WITH_CUDA
int cuda_compute_capability() { return 0; }
#endif

}  // namespace fomoe
