// SPDX-License-Identifier: Apache-2.0
// A thread owns blocks of tokens. Each block leaves its sums over tokens in the workspace, and one
// pass adds the blocks up in order.
#include "fomoe/topk_gate.h"

#include <functional>

#include "fomoe/parallel.h"
#include "fomoe/score.h"
#include "fomoe/workspace.h"
#include "gate_row.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kFewChoices = 32;  // up to this top_k, a vector pass per choice beats sorting

/// Sums of the blocks, as they lie in the workspace.
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

template <typename Real>
FOMOE_INLINE void select(const Real* logits, const Gate& gate, int32_t* ids) {
  Rank<Real> ranks[kMaxExperts];
  const auto num_experts = static_cast<int32_t>(gate.num_experts);
  for (int32_t e = 0; e < num_experts; ++e) ranks[e] = rank_of(logits[e], e);
  if (gate.top_k > kFewChoices) {
    std::partial_sort(ranks, ranks + gate.top_k, ranks + num_experts, std::greater<>());
    for (int64_t k = 0; k < gate.top_k; ++k) ids[k] = expert_of<Real>(ranks[k]);
    return;
  }
  for (int64_t k = 0; k < gate.top_k; ++k) {
    Rank<Real> best = kNoRank<Real>;
    for (int32_t e = 0; e < num_experts; ++e) best = ranks[e] > best ? ranks[e] : best;
    ids[k] = expert_of<Real>(best);
    ranks[ids[k]] = kNoRank<Real>;
  }
}

template <typename Real>
FOMOE_INLINE void weigh(const Gate& gate, const Real* values, const int32_t* ids, Real* weights) {
  Real sum = 0;
  for (int64_t k = 0; k < gate.top_k; ++k) {
    weights[k] = values[ids[k]];
    sum += weights[k];
  }
  const Real scale = static_cast<Real>(gate.scale);
  for (int64_t k = 0; k < gate.top_k; ++k) {
    weights[k] = (gate.renormalize ? weights[k] / sum : weights[k]) * scale;
  }
}

template <typename T>
FOMOE_VECTORIZED void gate_block(const Gate& gate, const T* logits, int64_t block,
                                 const GateResult& result, BlockSums<Accumulate<T>> sums) {
  using Real = Accumulate<T>;
  const int64_t num_experts = gate.num_experts;
  Real* prob_sum = sums.prob_sum + block * num_experts;
  int32_t* counts = sums.counts + block * num_experts;
  std::fill_n(prob_sum, num_experts, Real(0));
  std::fill_n(counts, num_experts, 0);
  double z_sum = 0;

  GateRow<Real> row;
  const int64_t end = std::min(gate.num_tokens, (block + 1) * kTokensPerBlock);
  for (int64_t t = block * kTokensPerBlock; t < end; ++t) {
    fill_gate_row(gate, logits + t * num_experts, row);
    int32_t* ids = result.ids + t * gate.top_k;
    Real* weights = static_cast<Real*>(result.weights) + t * gate.top_k;
    select(row.logits, gate, ids);
    for (int64_t k = 0; k < gate.top_k; ++k) ++counts[ids[k]];
    if (gate.score == GateScore::kSoftmax) {
      weigh(gate, row.softmax, ids, weights);
      for (int64_t e = 0; e < num_experts; ++e) prob_sum[e] += row.softmax[e];
    } else {
      weigh(gate, row.sigmoid, ids, weights);
      for (int64_t e = 0; e < num_experts; ++e) prob_sum[e] += row.sigmoid[e] / row.sigmoid_sum;
    }
    z_sum += static_cast<double>(row.logsumexp) * row.logsumexp;
  }
  sums.z_sum[block] = z_sum;
}

template <typename Real>
void add_blocks(const Gate& gate, const BlockSums<Real>& sums, const GateResult& result) {
  parallel_for(gate.num_experts, 64, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      double prob_sum = 0;
      int64_t count = 0;
      for (int64_t block = 0; block < sums.num_blocks; ++block) {
        prob_sum += sums.prob_sum[block * gate.num_experts + e];
        count += sums.counts[block * gate.num_experts + e];
      }
      static_cast<Real*>(result.prob_sum)[e] = static_cast<Real>(prob_sum);
      result.counts[e] = count;
    }
  });
  double z_sum = 0;
  for (int64_t block = 0; block < sums.num_blocks; ++block) z_sum += sums.z_sum[block];
  *static_cast<Real*>(result.z_sum) = static_cast<Real>(z_sum);
}

}  // namespace

int64_t topk_gate_workspace_bytes(DType dtype, const Gate& gate) {
  Workspace workspace(nullptr);
  dispatch(dtype, [&](auto element) {
    const BlockSums<Accumulate<decltype(element)>> sums(gate, workspace);
  });
  return workspace.bytes();
}

void topk_gate(DType dtype, const Gate& gate, const void* logits, const GateResult& result,
               void* workspace) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    Workspace memory(workspace);
    const BlockSums<Accumulate<T>> sums(gate, memory);
    parallel_for(sums.num_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        gate_block(gate, static_cast<const T*>(logits), block, result, sums);
      }
    });
    add_blocks(gate, sums, result);
  });
}

}  // namespace fomoe::cpu
