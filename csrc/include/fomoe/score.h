// SPDX-License-Identifier: Apache-2.0
// The selection score of the router and its order, defined once for every device: whatever decides
// which experts are chosen is spelled out here in single IEEE operations, so that ids are the same
// to the bit everywhere.
//
// Experts are compared through integers, so that their order is total: the larger score is better,
// equal scores go to the lower index; -0 equals +0, and NaN ranks below every number, -inf
// included.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "fomoe/host_device.h"
#include "fomoe/vectorize.h"

namespace fomoe {

/// lowest + r * (next + r * (...)), one rounding per coefficient.
template <typename Real, typename... Coefficients>
FOMOE_HOST_DEVICE FOMOE_INLINE Real horner(Real r, double lowest, Coefficients... higher) {
  if constexpr (sizeof...(higher) == 0) {
    return static_cast<Real>(lowest);
  } else {
    return std::fma(horner(r, higher...), r, static_cast<Real>(lowest));
  }
}

/// Taylor series of exp for |r| <= log(2) / 2, to a twentieth of a unit in the last place.
FOMOE_HOST_DEVICE FOMOE_INLINE float short_exponential(float r) {
  return horner(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040);
}
FOMOE_HOST_DEVICE FOMOE_INLINE double short_exponential(double r) {
  return horner(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
                1.0 / 6227020800);
}

template <typename Real>
struct SigmoidSteps;

template <>
struct SigmoidSteps<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kExponentBias = 127;
  static constexpr float kLimit = 87;         // beyond it a result would be subnormal
  static constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLog2 = 0x1.62e430p-1f, kLog2Rest = -0x1.05c610p-29f;
};

template <>
struct SigmoidSteps<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kExponentBias = 1023;
  static constexpr double kLimit = 708;
  static constexpr double kShift = 0x1.8p52;
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLog2 = 0x1.62e42fefa39efp-1, kLog2Rest = 0x1.abc9e3b39803fp-56;
};

/// 1 / (1 + exp(-x)) to 2.5 units in the last place; 0 for x < -kLimit and 1 for large x, both
/// exactly, NaN for NaN. No step is subnormal, so that flushing them to zero changes nothing.
template <typename Real>
FOMOE_HOST_DEVICE FOMOE_INLINE Real sigmoid(Real x) {
  using Steps = SigmoidSteps<Real>;
  using Bits = typename Steps::Bits;
  constexpr Real kLimit = Steps::kLimit, kShift = Steps::kShift;
  Real z = -x;  // NaN passes both comparisons
  z = z < -kLimit ? -kLimit : z;
  z = z > kLimit ? kLimit : z;
  const Real shifted = std::fma(z, Steps::kLog2E, kShift);
  const Real exponent = shifted - kShift;
  const Real r = std::fma(exponent, -Steps::kLog2Rest, std::fma(exponent, -Steps::kLog2, z));
  // Unsigned, because the bits of a NaN are anything.
  const Bits biased =
      std::bit_cast<Bits>(shifted) - std::bit_cast<Bits>(kShift) + Steps::kExponentBias;
  const Real power = std::bit_cast<Real>(static_cast<Bits>(biased << Steps::kMantissaBits));
  const Real denominator = std::fma(short_exponential(r), power, Real(1));
  return x < -kLimit ? Real(0) : Real(1) / denominator;
}

/// What an expert is chosen by. Callers take bias 0 where there is none.
template <typename Real>
FOMOE_HOST_DEVICE FOMOE_INLINE Real selection_score(bool of_sigmoid, Real logit, Real bias) {
  return (of_sigmoid ? sigmoid(logit) : logit) + bias;
}

FOMOE_HOST_DEVICE inline int32_t score_key(float score) {
  // Adding +0 turns -0 into +0. Flipping the magnitude bits of negative numbers makes the order of
  // the bit patterns that of the numbers; no number maps to the lowest integer.
  constexpr int32_t kHighest = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
  const int32_t bits = std::bit_cast<int32_t>(score + 0.0f);
  const int32_t key = bits ^ ((bits >> 31) & kHighest);
  return score != score ? kLowest : key;
}

FOMOE_HOST_DEVICE inline int64_t score_key(double score) {
  constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
  const int64_t bits = std::bit_cast<int64_t>(score + 0.0);
  const int64_t key = bits ^ ((bits >> 63) & kHighest);
  return score != score ? kLowest : key;
}

__extension__ using Int128 = __int128;

/// Score and index in one integer: the largest rank is the next to choose.
template <typename Real>
using Rank = std::conditional_t<std::is_same_v<Real, float>, int64_t, Int128>;

template <typename Real>
FOMOE_HOST_DEVICE inline Rank<Real> rank_of(Real score, int32_t index) {
  return static_cast<Rank<Real>>(score_key(score)) << 32 | ~static_cast<uint32_t>(index);
}

template <typename Real>
FOMOE_HOST_DEVICE inline int32_t index_of(Rank<Real> rank) {
  return static_cast<int32_t>(~static_cast<uint32_t>(rank));
}

/// Below every rank.
template <typename Real>
inline constexpr Rank<Real> kNoRank =
    static_cast<Rank<Real>>(std::numeric_limits<decltype(score_key(Real{}))>::min()) << 32;

}  // namespace fomoe
