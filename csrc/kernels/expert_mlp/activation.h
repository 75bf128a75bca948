// SPDX-License-Identifier: Apache-2.0
// The elementwise part of the expert on the CPU, one routed row at a time.
#pragma once

#include "activated.h"
#include "fomoe/dtype.h"

namespace fomoe::cpu {

template <Activation activation, typename T>
FOMOE_VECTORIZED static void activate_rows(const T* pre, int64_t num_rows, int64_t expert_dim,
                                           T* hidden) {
  constexpr bool gated = is_gated(activation);
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* gate = pre + r * expert_dim * (gated ? 2 : 1);
    const T* up = gated ? gate + expert_dim : gate;
    T* target = hidden + r * expert_dim;
    for (int64_t f = 0; f < expert_dim; ++f) {
      target[f] = from_accumulate<T>(
          activated<activation>(to_accumulate(gate[f]), to_accumulate(up[f])).value);
    }
  }
}

/// Gradient of one row. `hidden` [F] holds d_hidden, the gradient without the combine weight, and
/// becomes weight * act(pre), which the gradient of w2 needs. Returns <d_hidden, act(pre)>.
template <Activation activation, typename T>
FOMOE_VECTORIZED static Accumulate<T> activate_row_backward(const T* pre, Accumulate<T> weight,
                                                            int64_t expert_dim, T* hidden,
                                                            T* d_pre) {
  using Real = Accumulate<T>;
  constexpr bool gated = is_gated(activation);
  constexpr int64_t kTile = 256;
  Real products[kTile];
  Real dot = 0;
  for (int64_t begin = 0; begin < expert_dim; begin += kTile) {
    const int64_t count = expert_dim - begin < kTile ? expert_dim - begin : kTile;
    const T* gate = pre + begin;
    const T* up = gated ? gate + expert_dim : gate;
    T *tile = hidden + begin, *d_gate = d_pre + begin, *d_up = d_gate + expert_dim;
    for (int64_t f = 0; f < count; ++f) {
      const auto act = activated<activation>(to_accumulate(gate[f]), to_accumulate(up[f]));
      const Real d_hidden = to_accumulate(tile[f]), d_act = weight * d_hidden;
      products[f] = d_hidden * act.value;
      tile[f] = from_accumulate<T>(weight * act.value);
      d_gate[f] = from_accumulate<T>(d_act * act.d_gate);
      if constexpr (gated) d_up[f] = from_accumulate<T>(d_act * act.d_up);
    }
    dot += sum_of<Real>(count, [&](int64_t f) { return products[f]; });
  }
  return dot;
}

}  // namespace fomoe::cpu
