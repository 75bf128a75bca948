// SPDX-License-Identifier: Apache-2.0
// topk_gate: the router's decision and its losses' sums, in one pass over the logits.
//
//   softmax: p = softmax(logits), weight = p[id]
//   sigmoid: s = sigmoid(logits), p = s / sum(s), weight = s[id]
//
//   ids = the K best experts by score.h
//   weights = weight / their sum over K (optional), * scale
//   counts[e] = slots that chose e
//   prob_sum[e] = sum_t p[t, e]
//   z_sum = sum_t logsumexp(logits[t])^2
//
// Minimum traffic: read T*E, write 2*T*K elements; the backward reads and writes T*E. Sums over
// tokens run over blocks of kTokensPerBlock in ascending order, whatever the number of threads.
#pragma once

#include "fomoe/dtype.h"

namespace fomoe {

inline constexpr int64_t kMaxExperts = 4096;
inline constexpr int64_t kTokensPerBlock = 128;

enum class GateScore : int32_t { kSoftmax = 0, kSigmoid = 1 };

struct Gate {
  int64_t num_tokens;   // T
  int64_t num_experts;  // E <= kMaxExperts
  int64_t top_k;        // 1 <= K <= E
  GateScore score;
  bool renormalize;
  double scale;
};

/// Where the forward writes; "sum" is the accumulation type of the logits.
struct GateResult {
  int32_t* ids;     // [T, K], best first
  void* weights;    // [T, K] sum
  int64_t* counts;  // [E]
  void* prob_sum;   // [E] sum
  void* z_sum;      // [] sum
};

/// Gradients of the outputs, of the same types; nullptr stands for zeros.
struct GateGradient {
  const void* weights;   // [T, K]
  const void* prob_sum;  // [E]
  const void* z_sum;     // []
};

namespace cpu {
int64_t topk_gate_workspace_bytes(DType dtype, const Gate& gate);

/// logits [T, E], dense, of type dtype.
void topk_gate(DType dtype, const Gate& gate, const void* logits, const GateResult& result,
               void* workspace);

/// ids [T, K] as the forward gave them, each in [0, E); grad_logits [T, E] of type dtype.
/// Recomputes the probabilities.
void topk_gate_backward(DType dtype, const Gate& gate, const void* logits, const int32_t* ids,
                        const GateGradient& gradient, void* grad_logits);
}  // namespace cpu

namespace reference {
/// Every floating point array is double.
void topk_gate(const Gate& gate, const double* logits, const GateResult& result);
void topk_gate_backward(const Gate& gate, const double* logits, const int32_t* ids,
                        const GateGradient& gradient, double* grad_logits);
}  // namespace reference

}  // namespace fomoe
