// SPDX-License-Identifier: Apache-2.0
// A thread owns a run of tokens; a token's gradient depends on its own logits only.
//
//   d_value[e] = d_prob_sum[e] * (d p / d value) + the gradient of the chosen weights at their ids
//   softmax:  d_logit = p * (d_p - <p, d_p>)          sigmoid:  d_logit = d_s * s * (1 - s)
//   z loss:   d_logit += d_z_sum * 2 * logsumexp * softmax
#include "fomoe/topk_gate.h"

#include "fomoe/parallel.h"
#include "gate_row.h"

namespace fomoe::cpu {
namespace {

/// Adds the gradient of the chosen weights to `d_values` [E] at their ids.
template <typename Real>
FOMOE_INLINE void add_weight_gradient(const Gate& gate, const Real* values, const int32_t* ids,
                                      const Real* d_weights, Real* d_values) {
  const Real scale = static_cast<Real>(gate.scale);
  Real sum = 1, inner = 0;
  if (gate.renormalize) {  // weight = value / sum, so that moving all values together moves nothing
    sum = 0;
    for (int64_t k = 0; k < gate.top_k; ++k) sum += values[ids[k]];
    for (int64_t k = 0; k < gate.top_k; ++k) inner += d_weights[k] * (values[ids[k]] / sum);
  }
  for (int64_t k = 0; k < gate.top_k; ++k) {
    d_values[ids[k]] += (d_weights[k] - inner) / sum * scale;
  }
}

template <typename Real>
FOMOE_INLINE void softmax_gradient(const Gate& gate, const GateRow<Real>& row, Real z_factor,
                                   const Real* d_values, Real* d_logits) {
  const Real inner =
      sum_of<Real>(gate.num_experts, [&](int64_t e) { return row.softmax[e] * d_values[e]; });
  for (int64_t e = 0; e < gate.num_experts; ++e) {
    d_logits[e] = row.softmax[e] * (d_values[e] - inner + z_factor);
  }
}

template <typename Real>
FOMOE_INLINE void sigmoid_gradient(const Gate& gate, const GateRow<Real>& row, Real z_factor,
                                   const Real* d_values, Real* d_logits) {
  for (int64_t e = 0; e < gate.num_experts; ++e) {
    const Real s = row.sigmoid[e];
    d_logits[e] = d_values[e] * s * (Real(1) - s) + z_factor * row.softmax[e];
  }
}

template <typename T>
FOMOE_VECTORIZED void gate_backward(const Gate& gate, const T* logits, const int32_t* ids,
                                    const GateGradient& gradient, int64_t begin, int64_t end,
                                    T* grad_logits) {
  using Real = Accumulate<T>;
  const auto* d_weights = static_cast<const Real*>(gradient.weights);
  const auto* d_prob_sum = static_cast<const Real*>(gradient.prob_sum);
  const auto* d_z_sum = static_cast<const Real*>(gradient.z_sum);
  const int64_t num_experts = gate.num_experts, top_k = gate.top_k;
  const bool is_sigmoid = gate.score == GateScore::kSigmoid;
  GateRow<Real> row;
  Real d_values[kMaxExperts], d_logits[kMaxExperts];

  for (int64_t t = begin; t < end; ++t) {
    fill_gate_row(gate, logits + t * num_experts, row);
    const Real* values = is_sigmoid ? row.sigmoid : row.softmax;
    std::fill_n(d_values, num_experts, Real(0));
    if (d_prob_sum && is_sigmoid) {  // p = s / sum(s)
      const Real inner =
          sum_of<Real>(num_experts, [&](int64_t e) { return d_prob_sum[e] * row.sigmoid[e]; }) /
          row.sigmoid_sum;
      for (int64_t e = 0; e < num_experts; ++e) {
        d_values[e] = (d_prob_sum[e] - inner) / row.sigmoid_sum;
      }
    } else if (d_prob_sum) {
      std::copy_n(d_prob_sum, num_experts, d_values);
    }
    if (d_weights) {
      add_weight_gradient(gate, values, ids + t * top_k, d_weights + t * top_k, d_values);
    }
    const Real z_factor = d_z_sum ? Real(2) * *d_z_sum * row.logsumexp : Real(0);
    is_sigmoid ? sigmoid_gradient(gate, row, z_factor, d_values, d_logits)
               : softmax_gradient(gate, row, z_factor, d_values, d_logits);
    T* grad_row = grad_logits + t * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) grad_row[e] = from_accumulate<T>(d_logits[e]);
  }
}

}  // namespace

void topk_gate_backward(DType dtype, const Gate& gate, const void* logits, const int32_t* ids,
                        const GateGradient& gradient, void* grad_logits) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(gate.num_tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) {
      gate_backward(gate, static_cast<const T*>(logits), ids, gradient, begin, end,
                    static_cast<T*>(grad_logits));
    });
  });
}

}  // namespace fomoe::cpu
