// SPDX-License-Identifier: Apache-2.0
// One token of the gate on the CPU: what the forward and the backward both compute from its logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "fomoe/dtype.h"
#include "fomoe/exponential.h"
#include "fomoe/topk_gate.h"

namespace fomoe::cpu {

/// The logits of a token widened, and what both scores need of them.
template <typename Real>
struct GateRow {
  Real logits[kMaxExperts];
  Real softmax[kMaxExperts];
  Real sigmoid[kMaxExperts];  // only with GateScore::kSigmoid
  Real logsumexp;
  Real sigmoid_sum;
};

template <typename Real>
FOMOE_INLINE Real largest(const Real* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  Real lanes[kLanes];
  for (Real& lane : lanes) lane = -std::numeric_limits<Real>::infinity();
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  for (int64_t i = whole; i < count; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

template <typename T>
FOMOE_INLINE void fill_gate_row(const Gate& gate, const T* logits, GateRow<Accumulate<T>>& row) {
  using Real = Accumulate<T>;
  const int64_t num_experts = gate.num_experts;
  for (int64_t e = 0; e < num_experts; ++e) row.logits[e] = to_accumulate(logits[e]);

  // NaN never is the largest, but reaches the sum and through it every probability. An infinite
  // largest logit makes the probabilities NaN, yet leaves the logsumexp that infinity.
  const Real shift = largest(row.logits, num_experts);
  for (int64_t e = 0; e < num_experts; ++e) row.softmax[e] = exponential(row.logits[e] - shift);
  const Real sum = sum_of<Real>(num_experts, [&](int64_t e) { return row.softmax[e]; });
  for (int64_t e = 0; e < num_experts; ++e) row.softmax[e] /= sum;
  row.logsumexp = shift + std::log(sum);
  if (std::isinf(shift)) {
    const bool has_nan = std::any_of(row.logits, row.logits + num_experts,
                                     [](Real logit) { return std::isnan(logit); });
    if (!has_nan) row.logsumexp = shift;
  }

  if (gate.score == GateScore::kSigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) row.sigmoid[e] = logistic(row.logits[e]);
    row.sigmoid_sum = sum_of<Real>(num_experts, [&](int64_t e) { return row.sigmoid[e]; });
  }
}

}  // namespace fomoe::cpu
