// SPDX-License-Identifier: Apache-2.0
// One token of the gate on the CPU: what the forward and the backward both compute from its logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "eligible.h"
#include "fomoe/dtype.h"
#include "fomoe/exponential.h"
#include "fomoe/score.h"
#include "fomoe/topk_gate.h"

namespace fomoe::cpu {

/// The eligible logits of a token widened, and what the scores need of them; indexed by position.
template <typename Real>
struct GateRow {
  const Real* logits;
  Real softmax[kMaxExperts];
  Real sigmoid[kMaxExperts];  // only with GateScore::kSigmoid
  Real logsumexp;
  Real sigmoid_sum;  // 1 instead of 0, so that the shares of zeros are zeros
  Real gathered[kMaxExperts];
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

/// The widened values at the positions of eligible experts, of an array over all experts: the array
/// itself or a copy in `gathered`.
template <typename Real, typename T>
FOMOE_INLINE const Real* gather_eligible(const Eligible& eligible, const T* values,
                                         Real* gathered) {
  if constexpr (std::is_same_v<T, Real>) {
    if (eligible.is_all) return values;
  }
  if (eligible.is_all) {
    for (int64_t i = 0; i < eligible.count; ++i) gathered[i] = to_accumulate(values[i]);
  } else {
    for (int64_t i = 0; i < eligible.count; ++i) {
      gathered[i] = to_accumulate(values[eligible.experts[i]]);
    }
  }
  return gathered;
}

/// There must be an eligible expert.
template <typename T>
FOMOE_INLINE void fill_gate_row(const Gate& gate, const Eligible& eligible, const T* logits,
                                GateRow<Accumulate<T>>& row) {
  using Real = Accumulate<T>;
  const int64_t count = eligible.count;
  const Real* values = gather_eligible(eligible, logits, row.gathered);
  row.logits = values;

  // NaN never is the largest, but reaches the sum and through it every probability. An infinite
  // largest logit makes the probabilities NaN, yet leaves the logsumexp that infinity.
  const Real shift = largest(values, count);
  for (int64_t i = 0; i < count; ++i) row.softmax[i] = exponential(values[i] - shift);
  const Real sum = sum_of<Real>(count, [&](int64_t i) { return row.softmax[i]; });
  for (int64_t i = 0; i < count; ++i) row.softmax[i] /= sum;
  row.logsumexp = shift + std::log(sum);
  if (std::isinf(shift)) {
    const bool has_nan =
        std::any_of(values, values + count, [](Real logit) { return std::isnan(logit); });
    if (!has_nan) row.logsumexp = shift;
  }

  if (gate.score == GateScore::kSigmoid) {
    for (int64_t i = 0; i < count; ++i) row.sigmoid[i] = sigmoid(values[i]);
    const Real total = sum_of<Real>(count, [&](int64_t i) { return row.sigmoid[i]; });
    row.sigmoid_sum = total == 0 ? Real(1) : total;
  }
}

/// Whether weights are shares of the chosen values.
inline bool weights_are_shares(const Gate& gate) {
  return gate.renormalize || (gate.score == GateScore::kSoftmax && gate.score_after_top_k);
}

/// Weights of the chosen positions before `scale`.
template <typename Real>
FOMOE_INLINE void weigh(const Gate& gate, const GateRow<Real>& row, const int32_t* positions,
                        int64_t num_choices, Real* weights) {
  if (gate.score == GateScore::kUnit) {
    std::fill_n(weights, num_choices, Real(1));
  } else if (gate.score == GateScore::kSigmoid) {
    for (int64_t k = 0; k < num_choices; ++k) weights[k] = row.sigmoid[positions[k]];
  } else if (gate.score_after_top_k) {
    Real shift = -std::numeric_limits<Real>::infinity();
    for (int64_t k = 0; k < num_choices; ++k) {
      weights[k] = row.logits[positions[k]];
      shift = weights[k] > shift ? weights[k] : shift;
    }
    for (int64_t k = 0; k < num_choices; ++k) weights[k] = exponential(weights[k] - shift);
  } else {
    for (int64_t k = 0; k < num_choices; ++k) weights[k] = row.softmax[positions[k]];
  }
  if (!weights_are_shares(gate)) return;
  Real sum = 0;
  for (int64_t k = 0; k < num_choices; ++k) sum += weights[k];
  const Real divisor = sum == 0 ? Real(1) : sum;
  for (int64_t k = 0; k < num_choices; ++k) weights[k] /= divisor;
}

}  // namespace fomoe::cpu
