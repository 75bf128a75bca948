// SPDX-License-Identifier: Apache-2.0
// Selection by a whole block: the set of the best experts digit by digit of their keys, from the
// highest on, then a sort of only these.
#pragma once

#include <bit>
#include <type_traits>

#include "topk_gate/select.cuh"

namespace fomoe::cuda {

/// A choice's place in the sort: its key, then expert << 16 | where its logit lies.
template <typename Real>
struct SelectionTables {
  static constexpr int kBuckets = 256;

  static FOMOE_HOST_DEVICE int room(int64_t top_k) {
    return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(top_k)));
  }
  static int64_t bytes(int64_t top_k) {
    return room(top_k) * static_cast<int64_t>(2 * sizeof(Real) + 4) + (kBuckets + 4) * 4;
  }

  FOMOE_DEVICE SelectionTables(const Choices<Real>& choices, int room)
      : keys(reinterpret_cast<Key<Real>*>(choices.logits + room)),
        experts(reinterpret_cast<uint32_t*>(choices.ids)),
        histogram(experts + room),
        state(reinterpret_cast<int32_t*>(histogram + kBuckets)) {}

  Key<Real>* keys;      // [room]
  uint32_t* experts;    // [room]
  uint32_t* histogram;  // [kBuckets]
  int32_t* state;       // [4]
};

/// The choices at the beginning of the memory, with the keys between their logits and their ids.
template <typename Real>
FOMOE_DEVICE Choices<Real> choices_of_block(char* memory, int room) {
  Choices<Real> choices(memory, room);
  choices.ids = reinterpret_cast<int32_t*>(choices.logits + 2 * room);
  return choices;
}

/// Digit `place` of key and index: the digits of the key first, then those of an index that
/// descends.
template <typename Real>
FOMOE_DEVICE int digit_of(Key<Real> key, int expert, int place) {
  using Unsigned = std::make_unsigned_t<Key<Real>>;
  constexpr int kKeyDigits = sizeof(Real);
  if (place >= kKeyDigits) {
    return static_cast<int>(kMaxExperts - 1 - expert) >> (8 * (kKeyDigits + 1 - place)) & 255;
  }
  const Unsigned ordered = static_cast<Unsigned>(key) ^ static_cast<Unsigned>(kNoKey<Real>);
  return static_cast<int>(ordered >> (8 * (kKeyDigits - 1 - place)) & 255);
}

/// Which bucket, counted from the highest down, holds the element number `wanted` (from 1), how
/// many lie above it and how many inside: left in state[0 .. 2].
template <typename Tables>
FOMOE_DEVICE void find_bucket(const Tables& tables, int wanted) {
  constexpr int kOwn = Tables::kBuckets / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= kWarpSize) return;
  const int highest = Tables::kBuckets - 1 - lane * kOwn;
  int own = 0;
  for (int i = 0; i < kOwn; ++i) own += static_cast<int>(tables.histogram[highest - i]);
  int through = own;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += other;
  }
  int above = through - own;
  if (above >= wanted || through < wanted) return;
  for (int bucket = highest;; --bucket) {
    const int inside = static_cast<int>(tables.histogram[bucket]);
    if (above + inside >= wanted) {
      tables.state[0] = bucket;
      tables.state[1] = above;
      tables.state[2] = inside;
      return;
    }
    above += inside;
  }
}

/// The thread's values that are among the `wanted` best of the candidates, as bits.
template <typename Real>
FOMOE_DEVICE uint32_t best_values(const BlockTeam& team, const Layout<BlockTeam>& layout,
                                  const Key<Real> (&keys)[kValues], uint32_t candidates, int wanted,
                                  const SelectionTables<Real>& tables) {
  uint32_t chosen = 0;
  for (int place = 0; wanted > 0; ++place) {
    for (int i = team.rank; i < tables.kBuckets; i += team.size) tables.histogram[i] = 0;
    team.sync();
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (!(candidates >> j & 1)) continue;
      atomicAdd(tables.histogram + digit_of<Real>(keys[j], layout.expert(j), place), 1u);
    }
    team.sync();
    find_bucket(tables, wanted);
    team.sync();
    const int bucket = tables.state[0], inside = tables.state[2];
    wanted -= tables.state[1];
    const bool takes_all = inside == wanted;
    uint32_t left = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (!(candidates >> j & 1)) continue;
      const int digit = digit_of<Real>(keys[j], layout.expert(j), place);
      const bool is_in = digit > bucket || (digit == bucket && takes_all);
      chosen |= is_in ? 1u << j : 0u;
      left |= digit == bucket && !takes_all ? 1u << j : 0u;
    }
    candidates = left;
    if (takes_all) wanted = 0;
  }
  return chosen;
}

/// Bitonic, best first; `room` is a power of two.
template <typename Real>
FOMOE_DEVICE void sort_choices(const BlockTeam& team, const SelectionTables<Real>& tables,
                               int room) {
  Key<Real>* keys = tables.keys;
  uint32_t* experts = tables.experts;
  for (int run = 2; run <= room; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = team.rank; i < room / 2; i += team.size) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const bool is_best_first = (low & run) == 0;
        const Key<Real> low_key = keys[low], high_key = keys[high];
        const uint32_t low_expert = experts[low], high_expert = experts[high];
        const bool high_is_better =
            high_key > low_key || (high_key == low_key && high_expert < low_expert);
        if (high_is_better != is_best_first) continue;
        keys[low] = high_key;
        keys[high] = low_key;
        experts[low] = high_expert;
        experts[high] = low_expert;
      }
      team.sync();
    }
  }
}

/// Replaces the sorted places by ids and their logits.
template <typename Real>
FOMOE_DEVICE void resolve(const BlockTeam& team, const Choices<Real>& choices,
                          const SelectionTables<Real>& tables, int num_choices, int top_k) {
  Real logits[kValues] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int k = i * team.size + team.rank;
    if (k < num_choices) logits[i] = choices.logits[tables.experts[k] & 0xffff];
  }
  team.sync();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int k = i * team.size + team.rank;
    if (k >= top_k) continue;
    choices.logits[k] = logits[i];
    choices.ids[k] = k < num_choices ? static_cast<int32_t>(tables.experts[k] >> 16) : -1;
  }
  team.sync();
}

template <typename Real>
FOMOE_DEVICE Choices<Real> select(const Gate& gate, const BlockTeam& team,
                                  const Layout<BlockTeam>& layout, Key<Real> (&keys)[kValues],
                                  const Real (&x)[kValues], char* memory, char* /*block_memory*/) {
  const int top_k = static_cast<int>(gate.top_k), room = SelectionTables<Real>::room(top_k);
  const Choices<Real> choices = choices_of_block<Real>(memory, room);
  const SelectionTables<Real> tables(choices, room);
  uint32_t candidates = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) candidates |= keys[j] != kNoKey<Real> ? 1u << j : 0u;
  const int num_candidates = sum_over(team, __popc(candidates));
  const int num_choices = std::min(top_k, num_candidates);
  const uint32_t chosen = num_candidates <= top_k
                              ? candidates
                              : best_values(team, layout, keys, candidates, num_choices, tables);

  if (team.rank == 0) tables.state[3] = 0;
  for (int i = num_choices + team.rank; i < room; i += team.size) {
    tables.keys[i] = kNoKey<Real>;
    tables.experts[i] = ~0u;
  }
  team.sync();
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    if (!(chosen >> j & 1)) continue;
    const int place = atomicAdd(tables.state + 3, 1);  // any: the sort brings the order
    tables.keys[place] = keys[j];
    tables.experts[place] = static_cast<uint32_t>(layout.expert(j)) << 16 | place;
    choices.logits[place] = x[j];
  }
  team.sync();
  sort_choices(team, tables, room);
  resolve(team, choices, tables, num_choices, top_k);
  return choices;
}

template <typename Real>
int64_t selection_bytes(const BlockTeam*, const Gate& gate) {
  return SelectionTables<Real>::bytes(gate.top_k);
}
template <typename Real>
int64_t block_selection_bytes(const BlockTeam*) {
  return 0;
}

}  // namespace fomoe::cuda
