// SPDX-License-Identifier: Apache-2.0
// Which family of CUDA matrix kernels a product runs on.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "fomoe/dtype.h"
#include "fomoe/gemm.h"

namespace fomoe {

enum class KernelPath : int32_t {
  kSimple = 0,  // any dtype, shape and alignment, on CUDA cores
  kSm80 = 1,    // tensor cores by mma.sync
  kSm90 = 2,    // Hopper: wgmma fed by TMA
};

/// "simple", "sm80" or "sm90".
const char* name_of(KernelPath path);

/// The operands of one product, as far as the choice depends on them.
struct ProductOperands {
  DType dtype;
  std::initializer_list<const void*> arrays;  // nullptr does not matter
  std::initializer_list<int64_t> widths;      // every extent and stride, in elements, but 1
};

/// Why the operands cannot take the tensor core kernels, as half a sentence, or nullptr: those want
/// bfloat16 or float16, arrays that begin at a multiple of 16 bytes, and widths that are multiples
/// of 8 elements.
const char* obstacle_to_tensor_cores(const ProductOperands& operands);

/// compute_capability: 10 * major + minor of the device. Kernels for 9.0 run on no other card;
/// every other card from 8.0 on takes sm_80 code, or its PTX.
KernelPath choose_path(int compute_capability, const ProductOperands& operands);

/// Whether expert_mlp's forward on tensor core kernels is better off without them: so few rows that
/// reading the weights is all that takes time, by what the host knows.
bool is_decode(int64_t num_rows, int64_t num_experts);

/// Of the current CUDA device, or 0 without one.
int cuda_compute_capability();

}  // namespace fomoe
