// SPDX-License-Identifier: Apache-2.0
// What TMA knows about an array in global memory. Made by the host, passed to kernels by value as
// part of a __grid_constant__ parameter.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "fomoe/dtype.h"

namespace fomoe::cuda {

/// A CUtensorMap, opaque.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

struct Dimension {
  int64_t extent;  // elements
  int64_t stride;  // elements; 1 for the innermost
  int box;         // elements of it that one access moves, at most 256
};

/// Dimensions (2 or 3 of them) from the innermost on, whose box is 64 elements. The array begins
/// at a multiple of 16 bytes and its strides are such multiples; elements have 2 bytes. Boxes lie
/// in shared memory with 128-byte swizzle, at multiples of 1024 bytes; what a box has outside of
/// the array is read as zero and not written. Throws std::runtime_error if the driver refuses.
TensorMap make_tensor_map(DType dtype, const void* data,
                          std::initializer_list<Dimension> dimensions);

}  // namespace fomoe::cuda
