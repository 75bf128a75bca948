// SPDX-License-Identifier: Apache-2.0
// topk_gate: the router's decision and its losses' sums, in one pass over the logits.
//
// Eligible are the experts with resident[e], all without a mask; the others act as if their logits
// were not there. Over the eligible experts of a token:
//
//   softmax: value = p = softmax(logits), or after top-k the softmax over the chosen logits only
//   sigmoid: value = sigmoid(logits), p = value / sum(value); 0 if that sum is 0
//   unit:    value = 1, p = softmax(logits)
//
//   score = logit + bias, or sigmoid(logit) + bias: see scores_are_sigmoids
//   groups = the best top_k_groups of num_groups equal, contiguous ones, by their best score or by
//            the sum of their two best; only experts of these are chosen
//   ids = the K best by score (see score.h), then -1 where there are fewer than K
//   weights = value / sum of the chosen values (optional; 0 if that sum is 0), * scale; 0 at id -1
//   counts[e] = slots that chose e
//   prob_sum[e] = sum_t p[t, e]
//   z_sum = sum_t logsumexp(logits[t])^2; 0 without eligible experts
//
// Minimum traffic: read T*E, write 2*T*K elements; the backward reads and writes T*E. Sums over
// tokens run over blocks of kTokensPerBlock in ascending order, whatever the number of threads.
#pragma once

#include "fomoe/cuda.h"
#include "fomoe/dtype.h"

namespace fomoe {

inline constexpr int64_t kMaxExperts = 4096;
inline constexpr int64_t kTokensPerBlock = 128;

enum class GateScore : int32_t { kSoftmax = 0, kSigmoid = 1, kUnit = 2 };
enum class GroupScore : int32_t { kMax = 0, kTop2Sum = 1 };

struct Gate {
  int64_t num_tokens;   // T
  int64_t num_experts;  // E <= kMaxExperts
  int64_t top_k;        // 1 <= K <= top_k_groups * E / num_groups
  GateScore score;
  bool renormalize;
  double scale;
  bool score_after_top_k = false;
  int64_t num_groups = 1;  // divides E
  int64_t top_k_groups = 1;
  GroupScore group_score = GroupScore::kMax;
};

/// What the forward reads; "sum" is the accumulation type of the logits.
struct GateInput {
  const void* logits;              // [T, E]
  const void* bias = nullptr;      // [E] sum
  const bool* resident = nullptr;  // [E]
};

/// Where the forward writes.
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

/// Whether experts are chosen by sigmoid(logit). Where only the order matters, it is by the logit,
/// which does not saturate.
inline bool scores_are_sigmoids(const Gate& gate, bool has_bias) {
  const bool adds_scores = gate.num_groups > 1 && gate.group_score == GroupScore::kTop2Sum;
  return gate.score == GateScore::kSigmoid && (has_bias || adds_scores);
}

namespace cpu {
int64_t topk_gate_workspace_bytes(DType dtype, const Gate& gate);

/// Dense arrays; logits of type dtype.
void topk_gate(DType dtype, const Gate& gate, const GateInput& input, const GateResult& result,
               void* workspace);

/// ids [T, K] as the forward gave them, each -1 or that of an eligible expert; grad_logits [T, E]
/// of type dtype. Recomputes the probabilities. Reads neither input.bias nor the groups.
void topk_gate_backward(DType dtype, const Gate& gate, const GateInput& input, const int32_t* ids,
                        const GateGradient& gradient, void* grad_logits);
}  // namespace cpu

namespace cuda {
int64_t topk_gate_workspace_bytes(DType dtype, const Gate& gate);
int64_t topk_gate_backward_workspace_bytes(DType dtype, const Gate& gate);

/// As on the CPU, with the same ids to the bit; the sums over tokens are deterministic, but in an
/// order of their own.
void topk_gate(DType dtype, const Gate& gate, const GateInput& input, const GateResult& result,
               void* workspace, Stream stream);
void topk_gate_backward(DType dtype, const Gate& gate, const GateInput& input, const int32_t* ids,
                        const GateGradient& gradient, void* grad_logits, void* workspace,
                        Stream stream);
}  // namespace cuda

namespace reference {
/// Every floating point array is double.
void topk_gate(const Gate& gate, const GateInput& input, const GateResult& result);
void topk_gate_backward(const Gate& gate, const GateInput& input, const int32_t* ids,
                        const GateGradient& gradient, double* grad_logits);
}  // namespace reference

}  // namespace fomoe
