// SPDX-License-Identifier: Apache-2.0
// Which experts a token chooses on the CPU: a pass over the scores per choice, or a sort.
#pragma once

#include <algorithm>
#include <functional>

#include "eligible.h"
#include "fomoe/score.h"
#include "fomoe/topk_gate.h"

namespace fomoe::cpu {

constexpr int64_t kFewChoices = 32;  // up to this many, a vector pass per choice beats sorting

template <typename Real>
FOMOE_INLINE Rank<Real> best_rank(const Rank<Real>* ranks, int64_t count) {
  Rank<Real> best = kNoRank<Real>;
  for (int64_t i = 0; i < count; ++i) best = ranks[i] > best ? ranks[i] : best;
  return best;
}

/// Indices of the `num_best` largest ranks, of which ranks[i] is that of index i; spoils the ranks.
template <typename Real>
FOMOE_INLINE void take_best(Rank<Real>* ranks, int64_t count, int64_t num_best, int32_t* indices) {
  if (num_best > kFewChoices) {
    std::partial_sort(ranks, ranks + num_best, ranks + count, std::greater<>());
    for (int64_t k = 0; k < num_best; ++k) indices[k] = index_of<Real>(ranks[k]);
    return;
  }
  // The best of each chunk, of which a choice changes one.
  constexpr int64_t kChunk = 32;
  Rank<Real> chunk_best[kMaxExperts / kChunk];
  const int64_t num_chunks = (count + kChunk - 1) / kChunk;
  const auto refresh = [&](int64_t chunk) __attribute__((always_inline)) {
    const int64_t begin = chunk * kChunk;
    chunk_best[chunk] = best_rank<Real>(ranks + begin, std::min(kChunk, count - begin));
  };
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) refresh(chunk);
  for (int64_t k = 0; k < num_best; ++k) {
    indices[k] = index_of<Real>(best_rank<Real>(chunk_best, num_chunks));
    ranks[indices[k]] = kNoRank<Real>;
    refresh(indices[k] / kChunk);
  }
}

/// Rank of a group of at least one expert; leaves the experts' ranks as they were.
template <typename Real>
FOMOE_INLINE Rank<Real> group_rank(const Gate& gate, const Eligible& eligible, const Real* scores,
                                   Rank<Real>* ranks, int64_t group) {
  const int64_t begin = eligible.group_begin[group], size = eligible.group_begin[group + 1] - begin;
  const Rank<Real> best = best_rank<Real>(ranks + begin, size);
  const int32_t position = index_of<Real>(best);
  Real score = scores[position];
  if (gate.group_score == GroupScore::kTop2Sum && size > 1) {
    ranks[position] = kNoRank<Real>;
    score = score + scores[index_of<Real>(best_rank<Real>(ranks + begin, size))];
    ranks[position] = best;
  }
  return rank_of(score, static_cast<int32_t>(group));
}

/// Takes the experts of all but the best groups out of `ranks`; returns how many are left.
template <typename Real>
FOMOE_INLINE int64_t keep_best_groups(const Gate& gate, const Eligible& eligible,
                                      const Real* scores, Rank<Real>* ranks) {
  Rank<Real> group_ranks[kMaxExperts];
  int64_t num_candidates = 0;
  for (int64_t group = 0; group < gate.num_groups; ++group) {
    const bool is_empty = eligible.group_begin[group] == eligible.group_begin[group + 1];
    group_ranks[group] =
        is_empty ? kNoRank<Real> : group_rank(gate, eligible, scores, ranks, group);
    num_candidates += !is_empty;
  }
  int32_t best[kMaxExperts];
  bool is_kept[kMaxExperts];
  const int64_t num_kept = std::min(gate.top_k_groups, num_candidates);
  take_best<Real>(group_ranks, gate.num_groups, num_kept, best);
  std::fill_n(is_kept, gate.num_groups, false);
  for (int64_t i = 0; i < num_kept; ++i) is_kept[best[i]] = true;

  int64_t num_left = 0;
  for (int64_t group = 0; group < gate.num_groups; ++group) {
    const int64_t begin = eligible.group_begin[group],
                  size = eligible.group_begin[group + 1] - begin;
    if (is_kept[group]) {
      num_left += size;
    } else {
      std::fill_n(ranks + begin, size, kNoRank<Real>);
    }
  }
  return num_left;
}

/// Positions of the best experts by `scores`, at most K; returns how many.
template <typename Real>
FOMOE_INLINE int64_t select(const Gate& gate, const Eligible& eligible, const Real* scores,
                            int32_t* positions) {
  Rank<Real> ranks[kMaxExperts];
  const auto count = static_cast<int32_t>(eligible.count);
  for (int32_t i = 0; i < count; ++i) ranks[i] = rank_of(scores[i], i);
  int64_t num_left = count;
  if (gate.top_k_groups < gate.num_groups) {
    num_left = keep_best_groups(gate, eligible, scores, ranks);
  }
  const int64_t num_choices = std::min(gate.top_k, num_left);
  take_best<Real>(ranks, count, num_choices, positions);
  return num_choices;
}

}  // namespace fomoe::cpu
