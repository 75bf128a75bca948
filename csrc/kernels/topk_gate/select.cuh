// SPDX-License-Identifier: Apache-2.0
// Which experts a token chooses on the GPU, in the order of score.h: by comparing integer keys and,
// where they are equal, indices. Nothing here rounds but the sum of a group's two best scores.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "topk_gate/gate_row.cuh"

namespace fomoe::cuda {

template <typename Real>
using Key = decltype(score_key(Real{}));

/// Below every key.
template <typename Real>
constexpr Key<Real> kNoKey = std::numeric_limits<Key<Real>>::min();

/// That of NaN: no number maps to the integers next to the lowest.
template <typename Real>
constexpr Key<Real> kLowestKey = kNoKey<Real> + kValues;

template <typename Real>
FOMOE_DEVICE Key<Real> key_of(Real score) {
  constexpr Key<Real> kLowest = kLowestKey<Real>;
  return std::max(score_key(score), kLowest);
}

/// A score with this key.
template <typename Real>
FOMOE_DEVICE Real score_of(Key<Real> key) {
  constexpr Key<Real> kHighest = std::numeric_limits<Key<Real>>::max();
  return std::bit_cast<Real>(key ^ ((key >> (8 * sizeof(Real) - 1)) & kHighest));
}

template <typename Real>
FOMOE_DEVICE bool is_better(Key<Real> key, int index, Key<Real> than, int than_index) {
  return key > than || (key == than && index < than_index);
}

/// The keys of a token and of its groups in shared memory.
template <typename Real>
struct GroupTables {
  /// Groups of 32 experts would begin in the same bank.
  static FOMOE_HOST_DEVICE int padded(int expert) { return expert + expert / kWarpSize; }

  static int64_t bytes(int num_experts, int num_groups) {
    const int64_t keys = padded(num_experts) + 1 + num_groups;
    return ceil_div(keys * static_cast<int64_t>(sizeof(Real)) + num_groups, 16) * 16;
  }

  FOMOE_DEVICE GroupTables(char* memory, int num_experts, int num_groups)
      : keys(reinterpret_cast<Key<Real>*>(memory)),
        groups(keys + padded(num_experts) + 1),
        is_kept(reinterpret_cast<uint8_t*>(groups + num_groups)) {}

  Key<Real>* keys;    // [padded(E)]
  Key<Real>* groups;  // [num_groups]
  uint8_t* is_kept;   // [num_groups]
};

/// kNoKey for a group without candidates.
template <typename Real>
FOMOE_DEVICE Key<Real> group_key(const Gate& gate, const Key<Real>* keys, int group_size,
                                 int group) {
  Key<Real> best = kNoKey<Real>, second = kNoKey<Real>;
  for (int i = 0; i < group_size; ++i) {
    const Key<Real> key = keys[GroupTables<Real>::padded(group * group_size + i)];
    second = std::max(second, std::min(best, key));
    best = std::max(best, key);
  }
  if (gate.group_score == GroupScore::kMax || second == kNoKey<Real>) return best;
  return key_of(score_of<Real>(best) + score_of<Real>(second));
}

/// Takes the experts of all but the best groups out of `keys`.
template <typename Real, typename Team>
FOMOE_DEVICE void keep_best_groups(const Gate& gate, const Team& team, const Layout<Team>& layout,
                                   const GroupTables<Real>& tables, Key<Real> (&keys)[kValues]) {
  const int num_groups = static_cast<int>(gate.num_groups);
  const int num_experts = static_cast<int>(gate.num_experts);
  const int group_size = num_experts / num_groups;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int expert = layout.expert(j);
    if (expert < num_experts) tables.keys[tables.padded(expert)] = keys[j];
  }
  team.sync();
  for (int group = team.rank; group < num_groups; group += team.size) {
    tables.groups[group] = group_key<Real>(gate, tables.keys, group_size, group);
  }
  team.sync();
  for (int group = team.rank; group < num_groups; group += team.size) {
    const Key<Real> key = tables.groups[group];
    int num_better = 0;
    for (int other = 0; other < num_groups; ++other) {
      num_better += is_better<Real>(tables.groups[other], other, key, group);
    }
    tables.is_kept[group] = num_better < gate.top_k_groups;
  }
  team.sync();
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int expert = layout.expert(j);
    if (expert < num_experts && !tables.is_kept[expert / group_size]) keys[j] = kNoKey<Real>;
  }
  team.sync();
}

/// The choices of a token at the beginning of its team's memory, best first.
template <typename Real>
struct Choices {
  FOMOE_DEVICE Choices(char* memory, int room)
      : logits(reinterpret_cast<Real*>(memory)), ids(reinterpret_cast<int32_t*>(logits + room)) {}

  Real* logits;  // [room]: later the weights
  int32_t* ids;  // [room]: -1 from the first that is missing on
};

/// Replaces a thread's key and index by the best of its team.
template <typename Real>
FOMOE_DEVICE void reduce_to_best(const WarpTeam& team, Key<Real>& key, int& index) {
  for (int distance = team.size / 2; distance > 0; distance /= 2) {
    const Key<Real> other_key = __shfl_xor_sync(kAllLanes, key, distance);
    const int other = __shfl_xor_sync(kAllLanes, index, distance);
    const bool takes = is_better<Real>(other_key, other, key, index);
    key = takes ? other_key : key;
    index = takes ? other : index;
  }
}

/// One choice after the other, each from all values that are left.
template <typename Real>
FOMOE_DEVICE void select_one_by_one(const Gate& gate, const WarpTeam& team,
                                    const Layout<WarpTeam>& layout, Key<Real> (&keys)[kValues],
                                    const Real (&x)[kValues], const Choices<Real>& choices) {
  Key<Real> best = kNoKey<Real>;
  int best_j = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    best_j = keys[j] > best ? j : best_j;
    best = std::max(keys[j], best);
  }
  for (int k = 0; k < gate.top_k; ++k) {
    const int own = layout.expert(best_j);
    Key<Real> key = best;
    int expert = own;
    reduce_to_best<Real>(team, key, expert);
    const bool is_mine = expert == own;
    Real logit = 0;
    int next_j = 0;
    Key<Real> next = kNoKey<Real>;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const bool is_chosen = is_mine && j == best_j;
      logit = is_chosen ? x[j] : logit;
      keys[j] = is_chosen ? kNoKey<Real> : keys[j];
      next_j = keys[j] > next ? j : next_j;
      next = std::max(keys[j], next);
    }
    best = next;
    best_j = next_j;
    if (is_mine) {
      choices.ids[k] = key == kNoKey<Real> ? -1 : expert;
      choices.logits[k] = logit;
    }
  }
}

}  // namespace fomoe::cuda
