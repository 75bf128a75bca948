// SPDX-License-Identifier: Apache-2.0
// What the biases of one expert take from the backward on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fomoe/dtype.h"
#include "fomoe/vectorize.h"

namespace fomoe::cpu {

/// out [width] = sum over rows r, ascending, of rows[r], times weights[slots[r]] unless that is
/// nullptr.
template <typename T>
FOMOE_VECTORIZED static void sum_rows(const T* rows, const Accumulate<T>* weights,
                                      const int32_t* slots, int64_t num_rows, int64_t width,
                                      T* out) {
  using Real = Accumulate<T>;
  constexpr int64_t kTile = 256;
  for (int64_t begin = 0; begin < width; begin += kTile) {
    const int64_t count = std::min(kTile, width - begin);
    Real sums[kTile] = {};
    for (int64_t r = 0; r < num_rows; ++r) {
      const Real weight = weights ? weights[slots[r]] : Real(1);
      const T* row = rows + r * width + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += weight * to_accumulate(row[i]);
    }
    for (int64_t i = 0; i < count; ++i) out[begin + i] = from_accumulate<T>(sums[i]);
  }
}

/// d_weights[slots[r]] += <grad_y[r], bias>.
template <typename T>
FOMOE_VECTORIZED static void add_bias_to_weights(const T* bias, const T* grad_y,
                                                 const int32_t* slots, int64_t num_rows,
                                                 int64_t width, Accumulate<T>* d_weights) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* row = grad_y + r * width;
    d_weights[slots[r]] += sum_of<Accumulate<T>>(
        width, [&](int64_t i) { return to_accumulate(row[i]) * to_accumulate(bias[i]); });
  }
}

}  // namespace fomoe::cpu
