// SPDX-License-Identifier: Apache-2.0
// Division by a number that the host knows.
#pragma once

#include "cuda/device.cuh"

namespace fomoe::cuda {

/// Divides numbers below 2^31, without a division: the multiplier is
/// 2^(31 + shift) / divisor, rounded up, where 2^shift >= divisor, so that the error stays below
/// 1 / divisor.
struct Quotient {
  uint32_t multiplier;
  int32_t shift;

  FOMOE_DEVICE uint32_t operator()(uint32_t number) const {
    return __umulhi(2 * number, multiplier) >> shift;
  }
};

inline Quotient divided_by(int64_t divisor) {
  int32_t shift = 0;
  while (int64_t{1} << shift < divisor) ++shift;
  return {static_cast<uint32_t>(ceil_div(int64_t{1} << (31 + shift), divisor)), shift};
}

}  // namespace fomoe::cuda
