// SPDX-License-Identifier: Apache-2.0
// The selection score of the router, defined once for every device: currently the logit itself.
//
// A score is compared through an integer key, so that the order is total and the same everywhere:
// a larger key is a better expert; equal keys go to the lower expert index. -0 equals +0, and NaN
// ranks below every number, -inf included.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

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

}  // namespace fomoe
