// SPDX-License-Identifier: Apache-2.0
// A thread owns blocks of tokens. Each block leaves its sums over tokens in the workspace, and one
// pass adds the blocks up in order.
#include "fomoe/topk_gate.h"

#include "fomoe/parallel.h"
#include "fomoe/workspace.h"
#include "gate_row.h"
#include "select.h"

namespace fomoe::cpu {
namespace {

/// Sums of the blocks, as they lie in the workspace; by position, of which at most E are in use.
template <typename Real>
struct BlockSums {
  BlockSums(const Gate& gate, Workspace& workspace)
      : num_blocks(ceil_div(gate.num_tokens, kTokensPerBlock)),
        z_sum(workspace.take<double>(num_blocks)),
        prob_sum(workspace.take<Real>(num_blocks * gate.num_experts)),
        counts(workspace.take<int32_t>(num_blocks * gate.num_experts)) {}

  int64_t num_blocks;
  double* z_sum;    // [num_blocks]
  Real* prob_sum;   // [num_blocks, E]
  int32_t* counts;  // [num_blocks, E]
};

/// What the experts of a token are chosen by: `scores` is memory for it, if it is not the logits.
template <typename Real>
FOMOE_INLINE const Real* scores_of(const Gate& gate, const Eligible& eligible,
                                   const GateRow<Real>& row, const Real* bias, Real* scores) {
  const bool of_sigmoid = scores_are_sigmoids(gate, bias);
  const Real* unbiased = of_sigmoid ? row.sigmoid : row.logits;
  if (!bias) return unbiased;
  for (int64_t i = 0; i < eligible.count; ++i) scores[i] = unbiased[i] + bias[i];
  return scores;
}

/// Ids, weights and counts of one token; `positions` has room for K.
template <typename Real>
FOMOE_INLINE void choose(const Gate& gate, const Eligible& eligible, const GateRow<Real>& row,
                         const Real* scores, int32_t* positions, int32_t* ids, Real* weights,
                         int32_t* counts) {
  const int64_t num_choices = select(gate, eligible, scores, positions);
  weigh(gate, row, positions, num_choices, weights);
  const Real scale = static_cast<Real>(gate.scale);
  for (int64_t k = 0; k < num_choices; ++k) {
    weights[k] *= scale;
    ids[k] = eligible.experts[positions[k]];
    ++counts[positions[k]];
  }
  for (int64_t k = num_choices; k < gate.top_k; ++k) {
    weights[k] = 0;
    ids[k] = -1;
  }
}

template <typename T>
FOMOE_VECTORIZED void gate_block(const Gate& gate, const Eligible& eligible, const T* logits,
                                 const Accumulate<T>* bias, int64_t block, const GateResult& result,
                                 BlockSums<Accumulate<T>> sums) {
  using Real = Accumulate<T>;
  const int64_t num_experts = gate.num_experts, count = eligible.count;
  Real* prob_sum = sums.prob_sum + block * num_experts;
  int32_t* counts = sums.counts + block * num_experts;
  std::fill_n(prob_sum, count, Real(0));
  std::fill_n(counts, count, 0);
  double z_sum = 0;

  GateRow<Real> row;
  Real gathered_bias[kMaxExperts], scores[kMaxExperts];
  int32_t positions[kMaxExperts];
  if (bias) bias = gather_eligible(eligible, bias, gathered_bias);
  const int64_t end = std::min(gate.num_tokens, (block + 1) * kTokensPerBlock);
  for (int64_t t = block * kTokensPerBlock; t < end; ++t) {
    fill_gate_row(gate, eligible, logits + t * num_experts, row);
    const Real* chosen_by = scores_of(gate, eligible, row, bias, scores);
    choose(gate, eligible, row, chosen_by, positions, result.ids + t * gate.top_k,
           static_cast<Real*>(result.weights) + t * gate.top_k, counts);
    if (gate.score == GateScore::kSigmoid) {
      for (int64_t i = 0; i < count; ++i) prob_sum[i] += row.sigmoid[i] / row.sigmoid_sum;
    } else {
      for (int64_t i = 0; i < count; ++i) prob_sum[i] += row.softmax[i];
    }
    z_sum += static_cast<double>(row.logsumexp) * row.logsumexp;
  }
  sums.z_sum[block] = z_sum;
}

template <typename Real>
void add_blocks(const Gate& gate, const Eligible& eligible, const BlockSums<Real>& sums,
                const GateResult& result) {
  parallel_for(gate.num_experts, 64, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int32_t position = eligible.positions[e];
      double prob_sum = 0;
      int64_t count = 0;
      for (int64_t block = 0; block < sums.num_blocks && position >= 0; ++block) {
        prob_sum += sums.prob_sum[block * gate.num_experts + position];
        count += sums.counts[block * gate.num_experts + position];
      }
      static_cast<Real*>(result.prob_sum)[e] = static_cast<Real>(prob_sum);
      result.counts[e] = count;
    }
  });
  double z_sum = 0;
  for (int64_t block = 0; block < sums.num_blocks; ++block) z_sum += sums.z_sum[block];
  *static_cast<Real*>(result.z_sum) = static_cast<Real>(z_sum);
}

template <typename Real>
void choose_nothing(const Gate& gate, const GateResult& result) {
  const int64_t num_slots = gate.num_tokens * gate.top_k;
  std::fill_n(result.ids, num_slots, -1);
  std::fill_n(static_cast<Real*>(result.weights), num_slots, Real(0));
  std::fill_n(result.counts, gate.num_experts, int64_t{0});
  std::fill_n(static_cast<Real*>(result.prob_sum), gate.num_experts, Real(0));
  *static_cast<Real*>(result.z_sum) = Real(0);
}

}  // namespace

int64_t topk_gate_workspace_bytes(DType dtype, const Gate& gate) {
  Workspace workspace(nullptr);
  dispatch(dtype, [&](auto element) {
    const BlockSums<Accumulate<decltype(element)>> sums(gate, workspace);
  });
  return workspace.bytes();
}

void topk_gate(DType dtype, const Gate& gate, const GateInput& input, const GateResult& result,
               void* workspace) {
  const Eligible eligible(gate, input.resident);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (eligible.count == 0) return choose_nothing<Accumulate<T>>(gate, result);
    Workspace memory(workspace);
    const BlockSums<Accumulate<T>> sums(gate, memory);
    parallel_for(sums.num_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        gate_block(gate, eligible, static_cast<const T*>(input.logits),
                   static_cast<const Accumulate<T>*>(input.bias), block, result, sums);
      }
    });
    add_blocks(gate, eligible, sums, result);
  });
}

}  // namespace fomoe::cpu
