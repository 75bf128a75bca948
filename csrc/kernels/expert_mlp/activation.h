// SPDX-License-Identifier: Apache-2.0
// The elementwise part of the expert on the CPU, one routed row at a time.
#pragma once

#include "fomoe/dtype.h"
#include "fomoe/expert_mlp.h"
#include "fomoe/exponential.h"

namespace fomoe::cpu {

template <typename T>
FOMOE_VECTORIZED static void activate_rows(Activation activation, const T* pre, int64_t num_rows,
                                           int64_t expert_dim, T* hidden) {
  using Real = Accumulate<T>;
  const bool is_gated = activation == Activation::kSwiglu;
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* gate = pre + r * expert_dim * (is_gated ? 2 : 1);
    const T* up = gate + expert_dim;
    T* target = hidden + r * expert_dim;
    if (is_gated) {
      for (int64_t f = 0; f < expert_dim; ++f) {
        const Real g = to_accumulate(gate[f]);
        target[f] = from_accumulate<T>(g / (Real(1) + exponential(-g)) * to_accumulate(up[f]));
      }
    } else {
      for (int64_t f = 0; f < expert_dim; ++f) {
        const Real g = to_accumulate(gate[f]);
        target[f] = from_accumulate<T>(g / (Real(1) + exponential(-g)));
      }
    }
  }
}

/// Gradient of one row. `hidden` [F] holds d_hidden, the gradient without the combine weight, and
/// becomes weight * act(pre), which the gradient of w2 needs. Returns <d_hidden, act(pre)>.
template <typename T>
FOMOE_VECTORIZED static Accumulate<T> activate_row_backward(Activation activation, const T* pre,
                                                            Accumulate<T> weight,
                                                            int64_t expert_dim, T* hidden,
                                                            T* d_pre) {
  using Real = Accumulate<T>;
  constexpr int64_t kTile = 256;
  Real products[kTile];
  Real dot = 0;
  for (int64_t begin = 0; begin < expert_dim; begin += kTile) {
    const int64_t count = expert_dim - begin < kTile ? expert_dim - begin : kTile;
    const T *gate = pre + begin, *up = gate + expert_dim;
    T *tile = hidden + begin, *d_gate = d_pre + begin, *d_up = d_gate + expert_dim;
    if (activation == Activation::kSwiglu) {
      for (int64_t f = 0; f < count; ++f) {
        const Real g = to_accumulate(gate[f]), u = to_accumulate(up[f]);
        const Real d_hidden = to_accumulate(tile[f]), d_act = weight * d_hidden;
        const Real sigmoid = logistic(g), silu = g * sigmoid, act = silu * u;
        products[f] = d_hidden * act;
        tile[f] = from_accumulate<T>(weight * act);
        d_gate[f] = from_accumulate<T>(d_act * u * (sigmoid + silu * (Real(1) - sigmoid)));
        d_up[f] = from_accumulate<T>(d_act * silu);
      }
    } else {
      for (int64_t f = 0; f < count; ++f) {
        const Real g = to_accumulate(gate[f]);
        const Real d_hidden = to_accumulate(tile[f]), d_act = weight * d_hidden;
        const Real sigmoid = logistic(g), silu = g * sigmoid;
        products[f] = d_hidden * silu;
        tile[f] = from_accumulate<T>(weight * silu);
        d_gate[f] = from_accumulate<T>(d_act * (sigmoid + silu * (Real(1) - sigmoid)));
      }
    }
    dot += sum_of<Real>(count, [&](int64_t f) { return products[f]; });
  }
  return dot;
}

}  // namespace fomoe::cpu
