// SPDX-License-Identifier: Apache-2.0
// The selection score of the router, defined once for every device: currently the logit itself.
//
// Experts are compared through integers, so that their order is total and the same everywhere:
// the larger score is better, equal scores go to the lower index; -0 equals +0, and NaN ranks below
// every number, -inf included.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace fomoe {

inline int32_t score_key(float logit) {
  // Adding +0 turns -0 into +0. Flipping the magnitude bits of negative numbers makes the order of
  // the bit patterns that of the numbers; no number maps to the lowest integer.
  const int32_t bits = std::bit_cast<int32_t>(logit + 0.0f);
  const int32_t key = bits ^ ((bits >> 31) & std::numeric_limits<int32_t>::max());
  return logit != logit ? std::numeric_limits<int32_t>::min() : key;
}

inline int64_t score_key(double logit) {
  const int64_t bits = std::bit_cast<int64_t>(logit + 0.0);
  const int64_t key = bits ^ ((bits >> 63) & std::numeric_limits<int64_t>::max());
  return logit != logit ? std::numeric_limits<int64_t>::min() : key;
}

__extension__ using Int128 = __int128;

/// Score and index in one integer: the largest rank is the next expert to choose.
template <typename Real>
using Rank = std::conditional_t<std::is_same_v<Real, float>, int64_t, Int128>;

template <typename Real>
inline Rank<Real> rank_of(Real logit, int32_t expert) {
  return static_cast<Rank<Real>>(score_key(logit)) << 32 | ~static_cast<uint32_t>(expert);
}

template <typename Real>
inline int32_t expert_of(Rank<Real> rank) {
  return static_cast<int32_t>(~static_cast<uint32_t>(rank));
}

/// Below the rank of every expert.
template <typename Real>
inline constexpr Rank<Real> kNoRank =
    static_cast<Rank<Real>>(std::numeric_limits<decltype(score_key(Real{}))>::min()) << 32;

}  // namespace fomoe
