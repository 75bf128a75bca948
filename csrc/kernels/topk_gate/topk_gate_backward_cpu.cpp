// SPDX-License-Identifier: Apache-2.0
// A thread owns a run of tokens; a token's gradient depends on its own logits only. Per logit:
//
//   p, softmax:              p * (d_p - <p, d_p>), with the gradient of plain weights added to d_p
//   p, sigmoid:              p * (d_p - <p, d_p>) * (1 - s)
//   weights that are shares: w * (d_w - <w, d_w>), for sigmoid values * (1 - s)
//   plain sigmoid weights:   d_w * s * (1 - s)
//   z loss:                  d_z_sum * 2 * logsumexp * softmax
#include "fomoe/topk_gate.h"

#include "fomoe/parallel.h"
#include "gate_row.h"

namespace fomoe::cpu {
namespace {

/// The chosen experts of a token that has some, and the gradients of their weights over `scale`.
template <typename Real>
struct Choices {
  FOMOE_INLINE void gather(const Gate& gate, const Eligible& eligible, const int32_t* ids,
                           const Real* d_weights) {
    count = 0;
    for (int64_t k = 0; k < gate.top_k && d_weights; ++k) {
      if (ids[k] < 0) continue;
      positions[count] = eligible.positions[ids[k]];
      gradients[count++] = d_weights[k] * static_cast<Real>(gate.scale);
    }
  }

  int64_t count;
  int32_t positions[kMaxExperts];
  Real gradients[kMaxExperts];
};

/// Adds the gradient of weights that depend on the chosen logits only.
template <typename Real>
FOMOE_INLINE void add_chosen_gradient(const Gate& gate, const GateRow<Real>& row,
                                      const Choices<Real>& choices, Real* d_logits) {
  Real weights[kMaxExperts];
  weigh(gate, row, choices.positions, choices.count, weights);
  Real inner = 0;
  if (weights_are_shares(gate)) {  // moving all values together moves nothing
    for (int64_t k = 0; k < choices.count; ++k) inner += weights[k] * choices.gradients[k];
  }
  for (int64_t k = 0; k < choices.count; ++k) {
    const int32_t i = choices.positions[k];
    const Real slope = gate.score == GateScore::kSigmoid ? Real(1) - row.sigmoid[i] : Real(1);
    d_logits[i] += weights[k] * (choices.gradients[k] - inner) * slope;
  }
}

/// d_prob_sum [count] may be nullptr; `d_values` is memory.
template <typename Real>
FOMOE_INLINE void softmax_gradient(const Gate& gate, int64_t count, const GateRow<Real>& row,
                                   const Choices<Real>& choices, const Real* d_prob_sum,
                                   Real z_factor, Real* d_values, Real* d_logits) {
  if (d_prob_sum) {
    std::copy_n(d_prob_sum, count, d_values);
  } else {
    std::fill_n(d_values, count, Real(0));
  }
  const bool is_plain = gate.score == GateScore::kSoftmax && !weights_are_shares(gate);
  for (int64_t k = 0; k < choices.count && is_plain; ++k) {
    d_values[choices.positions[k]] += choices.gradients[k];
  }
  const Real inner = sum_of<Real>(count, [&](int64_t i) { return row.softmax[i] * d_values[i]; });
  for (int64_t i = 0; i < count; ++i) {
    d_logits[i] = row.softmax[i] * (d_values[i] - inner + z_factor);
  }
  if (gate.score == GateScore::kSoftmax && !is_plain) {
    add_chosen_gradient(gate, row, choices, d_logits);
  }
}

template <typename Real>
FOMOE_INLINE void sigmoid_gradient(const Gate& gate, int64_t count, const GateRow<Real>& row,
                                   const Choices<Real>& choices, const Real* d_prob_sum,
                                   Real z_factor, Real* d_logits) {
  if (z_factor != 0) {
    for (int64_t i = 0; i < count; ++i) d_logits[i] = z_factor * row.softmax[i];
  } else {  // the softmax may be NaN where the sigmoids are not
    std::fill_n(d_logits, count, Real(0));
  }
  if (d_prob_sum) {
    const Real inner =
        sum_of<Real>(count, [&](int64_t i) { return d_prob_sum[i] * row.sigmoid[i]; }) /
        row.sigmoid_sum;
    for (int64_t i = 0; i < count; ++i) {
      const Real s = row.sigmoid[i];
      d_logits[i] += s / row.sigmoid_sum * (d_prob_sum[i] - inner) * (Real(1) - s);
    }
  }
  add_chosen_gradient(gate, row, choices, d_logits);
}

template <typename T>
FOMOE_INLINE void write_gradient(const Gate& gate, const Eligible& eligible,
                                 const Accumulate<T>* d_logits, T* grad_row) {
  if (eligible.is_all) {
    for (int64_t i = 0; i < eligible.count; ++i) grad_row[i] = from_accumulate<T>(d_logits[i]);
    return;
  }
  std::fill_n(grad_row, gate.num_experts, T{});
  for (int64_t i = 0; i < eligible.count; ++i) {
    grad_row[eligible.experts[i]] = from_accumulate<T>(d_logits[i]);
  }
}

template <typename T>
FOMOE_VECTORIZED void gate_backward(const Gate& gate, const Eligible& eligible, const T* logits,
                                    const int32_t* ids, const GateGradient& gradient, int64_t begin,
                                    int64_t end, T* grad_logits) {
  using Real = Accumulate<T>;
  const auto* d_weights = static_cast<const Real*>(gradient.weights);
  const auto* d_z_sum = static_cast<const Real*>(gradient.z_sum);
  const int64_t num_experts = gate.num_experts, top_k = gate.top_k, count = eligible.count;
  GateRow<Real> row;
  Choices<Real> choices;
  Real gathered[kMaxExperts], d_values[kMaxExperts], d_logits[kMaxExperts];
  const auto* d_prob_sum = static_cast<const Real*>(gradient.prob_sum);
  if (d_prob_sum) d_prob_sum = gather_eligible(eligible, d_prob_sum, gathered);

  for (int64_t t = begin; t < end; ++t) {
    fill_gate_row(gate, eligible, logits + t * num_experts, row);
    choices.gather(gate, eligible, ids + t * top_k, d_weights ? d_weights + t * top_k : nullptr);
    const Real z_factor = d_z_sum ? Real(2) * *d_z_sum * row.logsumexp : Real(0);
    if (gate.score == GateScore::kSigmoid) {
      sigmoid_gradient(gate, count, row, choices, d_prob_sum, z_factor, d_logits);
    } else {
      softmax_gradient(gate, count, row, choices, d_prob_sum, z_factor, d_values, d_logits);
    }
    write_gradient(gate, eligible, d_logits, grad_logits + t * num_experts);
  }
}

}  // namespace

void topk_gate_backward(DType dtype, const Gate& gate, const GateInput& input, const int32_t* ids,
                        const GateGradient& gradient, void* grad_logits) {
  const Eligible eligible(gate, input.resident);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (eligible.count == 0) {
      std::fill_n(static_cast<T*>(grad_logits), gate.num_tokens * gate.num_experts, T{});
      return;
    }
    parallel_for(gate.num_tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) {
      gate_backward(gate, eligible, static_cast<const T*>(input.logits), ids, gradient, begin, end,
                    static_cast<T*>(grad_logits));
    });
  });
}

}  // namespace fomoe::cpu
