// SPDX-License-Identifier: Apache-2.0
// One token of the gate on the GPU: how its logits lie in the registers of a team, and what the
// forward and the backward both compute from them.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "fomoe/dtype.h"
#include "fomoe/score.h"
#include "fomoe/topk_gate.h"
#include "topk_gate/team.cuh"

namespace fomoe::cuda {

template <typename T>
struct alignas(16) Elements {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

/// An array [T, E] of logits or of their gradients.
struct GateRows {
  GateRows(DType type, const void* array, const Gate& gate)
      : data(const_cast<void*>(array)),
        dtype(type),
        num_tokens(gate.num_tokens),
        num_experts(static_cast<int>(gate.num_experts)),
        is_aligned(widest_access(address_of(array), gate.num_experts * size_of(type)) == 16) {}

  void* data;
  DType dtype;
  int64_t num_tokens;
  int num_experts;
  bool is_aligned;  // every row, to 16 bytes
};

/// Which expert a thread's value j is that of: packets of consecutive experts, dealt out in turn.
/// A thread's values are in ascending order.
template <typename Team>
struct Layout {
  FOMOE_DEVICE Layout(const Team& team, int packet_bits)
      : team_size(team.size), rank(team.rank), packet_bits(packet_bits) {}

  FOMOE_DEVICE int expert(int j) const {
    return ((((j >> packet_bits) * team_size + rank) << packet_bits) |
            (j & ((1 << packet_bits) - 1)));
  }

  int team_size, rank, packet_bits;
};

/// log2 of the elements in an access.
template <typename T>
constexpr int kPacketBits = std::countr_zero(16 / sizeof(T));

inline int packet_bits_of(DType dtype, bool is_aligned) {
  return is_aligned ? std::countr_zero(static_cast<uint64_t>(16 / size_of(dtype))) : 0;
}

/// `is_aligned`: to 16 bytes, and so is the layout's packet; `load` reads an element or a packet.
template <typename T, typename Real, typename Team, typename Load>
FOMOE_DEVICE void load_elements(const T* row, bool is_aligned, int num_experts,
                                const Layout<Team>& layout, const Load& load, Real (&x)[kValues]) {
  constexpr int kCount = Elements<T>::kCount;
  if (is_aligned) {
#pragma unroll
    for (int j = 0; j < kValues; j += kCount) {
      const int expert = layout.expert(j);
      if (expert >= num_experts) continue;
      const auto packet = load(reinterpret_cast<const Elements<T>*>(row + expert));
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[j + i] = to_accumulate(packet.values[i]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int expert = layout.expert(j);
    if (expert < num_experts) x[j] = to_accumulate(load(row + expert));
  }
}

template <typename T, typename Real, typename Team>
FOMOE_DEVICE void store_elements(T* row, bool is_aligned, int num_experts,
                                 const Layout<Team>& layout, const Real (&x)[kValues]) {
  constexpr int kCount = Elements<T>::kCount;
  if (is_aligned) {
#pragma unroll
    for (int j = 0; j < kValues; j += kCount) {
      const int expert = layout.expert(j);
      if (expert >= num_experts) continue;
      Elements<T> packet;
#pragma unroll
      for (int i = 0; i < kCount; ++i) packet.values[i] = from_accumulate<T>(x[j + i]);
      store_global(reinterpret_cast<Elements<T>*>(row + expert), packet);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int expert = layout.expert(j);
    if (expert < num_experts) store_global(row + expert, from_accumulate<T>(x[j]));
  }
}

/// Calls function(pointer to the row's elements) for the dtypes that accumulate in Real.
template <typename Real, typename Function>
FOMOE_DEVICE void with_row(const GateRows& rows, int64_t token, const Function& function) {
  const int64_t first = token * rows.num_experts;
  if constexpr (std::is_same_v<Real, double>) {
    function(static_cast<double*>(rows.data) + first);
  } else if (rows.dtype == DType::kFloat32) {
    function(static_cast<float*>(rows.data) + first);
  } else if (rows.dtype == DType::kBFloat16) {
    function(static_cast<BFloat16*>(rows.data) + first);
  } else {
    function(static_cast<Float16*>(rows.data) + first);
  }
}

/// Widened; the values without an expert are zeros.
template <typename Real, typename Team>
FOMOE_DEVICE void load_row(const GateRows& rows, int64_t token, const Layout<Team>& layout,
                           Real (&x)[kValues]) {
#pragma unroll
  for (int j = 0; j < kValues; ++j) x[j] = 0;
  if (token >= rows.num_tokens) return;
  const auto load = [](const auto* address) { return load_global_once(address); };
  with_row<Real>(rows, token, [&](auto* row) {
    load_elements(row, layout.packet_bits > 0, rows.num_experts, layout, load, x);
  });
}

template <typename Real, typename Team>
FOMOE_DEVICE void store_row(const GateRows& rows, int64_t token, const Layout<Team>& layout,
                            const Real (&x)[kValues]) {
  if (token >= rows.num_tokens) return;
  with_row<Real>(rows, token, [&](auto* row) {
    store_elements(row, layout.packet_bits > 0, rows.num_experts, layout, x);
  });
}

/// The values of an array over the experts that every token reads.
template <typename Real, typename Team>
FOMOE_DEVICE void load_shared_row(const Real* array, int num_experts, const Layout<Team>& layout,
                                  Real (&x)[kValues]) {
  const auto load = [](const auto* address) { return load_global(address); };
  const bool is_aligned = layout.packet_bits > 0 && reinterpret_cast<uint64_t>(array) % 16 == 0;
  load_elements(array, is_aligned, num_experts, layout, load, x);
}

/// The thread's values whose experts are eligible, as bits.
struct Eligible {
  template <typename Team>
  FOMOE_DEVICE Eligible(const Layout<Team>& layout, int num_experts, const bool* resident)
      : bits(0) {
    for (int j = 0; j < kValues; ++j) {
      const int expert = layout.expert(j);
      if (expert < num_experts && (!resident || load_global(resident + expert))) bits |= 1u << j;
    }
  }

  FOMOE_DEVICE bool operator[](int j) const { return bits >> j & 1; }

  uint32_t bits;
};

/// The eligible logits' softmax is exp(logit - shift) / sum.
template <typename Real>
struct Softmax {
  Real shift, sum, logsumexp;
};

/// `exponentials` of the values that are not eligible are zeros.
template <typename Real, typename Team>
FOMOE_DEVICE Softmax<Real> softmax_of(const Team& team, Eligible eligible, const Real (&x)[kValues],
                                      Real (&exponentials)[kValues]) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Softmax<Real> result;
  // NaN never is the largest, but reaches the sum and through it every probability. An infinite
  // largest logit makes the probabilities NaN, yet leaves the logsumexp that infinity.
  Real shift = -kInfinity;
#pragma unroll
  for (int j = 0; j < kValues; ++j) shift = eligible[j] && x[j] > shift ? x[j] : shift;
  result.shift = largest_of(team, shift);
  Real sum = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    exponentials[j] = eligible[j] ? std::exp(x[j] - result.shift) : Real(0);
    sum += exponentials[j];
  }
  result.sum = sum_over(team, sum);
  result.logsumexp = result.shift + std::log(result.sum);
  const bool is_infinite = result.shift == kInfinity || result.shift == -kInfinity;
  if (team.any_team(is_infinite)) {
    Real nans = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) nans += eligible[j] && x[j] != x[j] ? Real(1) : Real(0);
    nans = sum_over(team, nans);
    if (is_infinite && nans == 0) result.logsumexp = result.shift;
  }
  return result;
}

/// The sigmoids' sum, or 1 instead of 0, so that the shares of zeros are zeros.
template <typename Real, typename Team>
FOMOE_DEVICE Real sigmoids_of(const Team& team, Eligible eligible, const Real (&x)[kValues],
                              Real (&sigmoids)[kValues]) {
  Real sum = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    sigmoids[j] = eligible[j] ? sigmoid(x[j]) : Real(0);
    sum += sigmoids[j];
  }
  sum = sum_over(team, sum);
  return sum == 0 ? Real(1) : sum;
}

/// Whether weights are shares of the chosen values.
FOMOE_DEVICE bool weights_are_shares(const Gate& gate) {
  return gate.renormalize || (gate.score == GateScore::kSoftmax && gate.score_after_top_k);
}

}  // namespace fomoe::cuda
