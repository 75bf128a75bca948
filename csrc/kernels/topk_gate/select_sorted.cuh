// SPDX-License-Identifier: Apache-2.0
// Selection by lanes that first sort their own values, so that a choice compares only the best that
// each lane has left. Sorts words of the upper bits of a key and the value's number, with one
// minimum and one maximum per comparison; where that could differ from the order of the whole keys,
// it leaves the selection to others.
#pragma once

#include "topk_gate/select.cuh"

namespace fomoe::cuda {

/// What lanes look up by number, in shared memory: value j of thread t is at [j][t], so that any
/// numbers lie in different banks.
struct LaneTables {
  int32_t keys[kValues][WarpTeam::kThreads];
  int32_t order[kValues][WarpTeam::kThreads];  // sorted words, best first
  float logits[kValues][WarpTeam::kThreads];
};

static_assert(kLowestKey < float > -kNoKey<float> == kValues && (kValues & (kValues - 1)) == 0,
              "the words of missing values are apart from all others");

FOMOE_DEVICE int32_t sort_word(int32_t key, int j) { return (key & -kValues) | (kValues - 1 - j); }
FOMOE_DEVICE int value_number(int32_t word) { return kValues - 1 - (word & (kValues - 1)); }

template <int low, int high>
FOMOE_DEVICE void order_pair(int32_t (&words)[kValues]) {
  const int32_t better = std::max(words[low], words[high]);
  words[high] = std::min(words[low], words[high]);
  words[low] = better;
}

template <int first, int end, int stride, int step>
FOMOE_DEVICE void order_pairs(int32_t (&words)[kValues]) {
  if constexpr (first + stride < end) {
    order_pair<first, first + stride>(words);
    order_pairs<first + step, end, stride, step>(words);
  }
}

/// Batcher's odd-even merge of every stride-th word in [first, first + count).
template <int first, int count, int stride>
FOMOE_DEVICE void merge_words(int32_t (&words)[kValues]) {
  constexpr int step = 2 * stride;
  if constexpr (step < count) {
    merge_words<first, count, step>(words);
    merge_words<first + stride, count, step>(words);
    order_pairs<first + stride, first + count, stride, step>(words);
  } else {
    order_pair<first, first + stride>(words);
  }
}

template <int first, int count>
FOMOE_DEVICE void sort_words(int32_t (&words)[kValues]) {
  if constexpr (count > 1) {
    sort_words<first, count / 2>(words);
    sort_words<first + count / 2, count / 2>(words);
    merge_words<first, count, 1>(words);
  }
}

/// Whether the words are in the order of the keys: those that only differ by the number are equal
/// in the key's lower bits too.
FOMOE_DEVICE bool are_in_order(const LaneTables& tables, const int32_t (&words)[kValues]) {
  uint32_t doubtful = 0;
#pragma unroll
  for (int i = 0; i + 1 < kValues; ++i) {
    const bool same = (words[i] | (kValues - 1)) == (words[i + 1] | (kValues - 1)) &&
                      words[i] >= kLowestKey<float>;
    doubtful |= same ? 1u << i : 0u;
  }
  if (doubtful == 0) return true;
  const int thread = static_cast<int>(threadIdx.x);
  bool in_order = true;
  for (int i = 0; i + 1 < kValues; ++i) {
    if (!(doubtful >> i & 1)) continue;
    const int number = value_number(tables.order[i][thread]);
    const int next = value_number(tables.order[i + 1][thread]);
    in_order = in_order && tables.keys[number][thread] == tables.keys[next][thread];
  }
  return in_order;
}

/// The choices of all teams of the warp, or false if one of their lanes is in doubt.
FOMOE_DEVICE bool select_sorted(const Gate& gate, const WarpTeam& team,
                                const Layout<WarpTeam>& layout, const int32_t (&keys)[kValues],
                                const float (&x)[kValues], LaneTables& tables,
                                const Choices<float>& choices) {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t words[kValues];
#pragma unroll
  for (int j = 0; j < kValues; ++j) words[j] = sort_word(keys[j], j);
  sort_words<0, kValues>(words);
#pragma unroll
  for (int j = 0; j < kValues; ++j) {  // a thread only reads what it wrote
    tables.keys[j][thread] = keys[j];
    tables.order[j][thread] = words[j];
    tables.logits[j][thread] = x[j];
  }
  if (__any_sync(kAllLanes, !are_in_order(tables, words))) return false;

  int place = 0, j = value_number(words[0]);
  int32_t best = tables.keys[j][thread];
  for (int k = 0; k < gate.top_k; ++k) {
    const int own = layout.expert(j);
    int32_t key = best;
    int expert = own;
    reduce_to_best<float>(team, key, expert);
    if (expert == own) {
      choices.ids[k] = key == kNoKey<float> ? -1 : expert;
      choices.logits[k] = tables.logits[j][thread];
      ++place;
      best = kNoKey<float>;
      if (place < kValues) {
        j = value_number(tables.order[place][thread]);
        best = tables.keys[j][thread];
      }
      place = std::min(place, kValues - 1);
    }
  }
  return true;
}

template <typename Real>
FOMOE_DEVICE Choices<Real> select(const Gate& gate, const WarpTeam& team,
                                  const Layout<WarpTeam>& layout, Key<Real> (&keys)[kValues],
                                  const Real (&x)[kValues], char* memory, char* block_memory) {
  const Choices<Real> choices(memory, static_cast<int>(gate.top_k));
  bool is_done = false;
  if constexpr (std::is_same_v<Real, float>) {
    auto& tables = *reinterpret_cast<LaneTables*>(block_memory);
    is_done = select_sorted(gate, team, layout, keys, x, tables, choices);
  }
  if (!is_done) select_one_by_one(gate, team, layout, keys, x, choices);
  team.sync();
  return choices;
}

/// Of a team's memory, and of a block's.
template <typename Real>
int64_t selection_bytes(const WarpTeam*, const Gate& gate) {
  return gate.top_k * static_cast<int64_t>(sizeof(Real) + 4);
}
template <typename Real>
int64_t block_selection_bytes(const WarpTeam*) {
  return std::is_same_v<Real, float> ? sizeof(LaneTables) : 0;
}

}  // namespace fomoe::cuda
