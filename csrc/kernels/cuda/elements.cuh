// SPDX-License-Identifier: Apache-2.0
// Several elements that move in one access, and their arithmetic.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/memory.cuh"
#include "cuda/numeric.cuh"
#include "fomoe/dtype.h"

namespace fomoe::cuda {

/// `count` elements of T. Two of 16 bits are kept as one word: as two, they would take instructions
/// to put together and apart.
template <typename T, int count>
struct alignas(sizeof(T) * count) Elements {
  static constexpr bool kPairs = sizeof(T) == 2 && count % 2 == 0;
  using Part = std::conditional_t<kPairs, uint32_t, T>;
  Part parts[kPairs ? count / 2 : count];
};

template <typename T, int count>
FOMOE_DEVICE void widen(const Elements<T, count>& elements, Accumulate<T> (&values)[count]) {
  if constexpr (Elements<T, count>::kPairs) {
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      const Pair pair = unpack<T>(elements.parts[i / 2]);
      values[i] = pair.first;
      values[i + 1] = pair.second;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = to_accumulate(elements.parts[i]);
  }
}

/// Rounds to nearest, ties to even.
template <typename T, int count>
FOMOE_DEVICE Elements<T, count> narrow(const Accumulate<T> (&values)[count]) {
  Elements<T, count> elements;
  if constexpr (Elements<T, count>::kPairs) {
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      elements.parts[i / 2] = pack<T>(values[i], values[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) elements.parts[i] = from_accumulate<T>(values[i]);
  }
  return elements;
}

// A product that is rounded before it is added to something, as on the CPU: nvcc would otherwise
// fuse the two.
#ifdef FOMOE_EMULATION
inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }
#else
FOMOE_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
FOMOE_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

/// Calls function with the number of elements of T, as a constant, that move in one access of at
/// most `widest` bytes: 16 bytes, 4 bytes, or one element.
template <typename T, typename Function>
inline void with_elements_per_access(int widest, const Function& function) {
  if (widest >= 16) return function(std::integral_constant<int, 16 / sizeof(T)>{});
  if constexpr (sizeof(T) < 4) {
    if (widest >= 4) return function(std::integral_constant<int, 4 / sizeof(T)>{});
  }
  function(std::integral_constant<int, 1>{});
}

/// How blocks of at most 256 threads take rows of `accesses` accesses: whole warps per row, in as
/// few equal turns as possible, and several short rows per block.
struct RowShape {
  int threads_per_row, rows_per_block;

  explicit RowShape(int64_t accesses) {
    constexpr int64_t kMostThreads = 256;
    const int64_t turns = std::max<int64_t>(1, ceil_div(accesses, kMostThreads));
    const int64_t warps = std::max<int64_t>(1, ceil_div(ceil_div(accesses, turns), kWarpSize));
    threads_per_row = static_cast<int>(warps) * kWarpSize;
    rows_per_block = static_cast<int>(kMostThreads) / threads_per_row;
  }

  int64_t blocks(int64_t num_rows) const { return ceil_div(num_rows, rows_per_block); }
  int threads() const { return threads_per_row * rows_per_block; }

  /// Of the calling thread; in the last block there may be no such row.
  FOMOE_DEVICE int64_t own_row() const {
    return blockIdx.x * static_cast<int64_t>(rows_per_block) + threadIdx.x / threads_per_row;
  }
};

}  // namespace fomoe::cuda
