// SPDX-License-Identifier: Apache-2.0
// exp and the logistic function in a form that compilers vectorise.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "fomoe/host_device.h"
#include "fomoe/vectorize.h"

namespace fomoe {

inline double exponential(double x) { return std::exp(x); }

/// exp(x) to 2 units in the last place; exact at 0, 0 and infinity beyond the float range, NaN for
/// NaN. Cody-Waite reduction to |r| <= log(2) / 2 and the degree-6 polynomial of Cephes' expf.
FOMOE_INLINE float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2Upper = 0.693359375f, kLog2Lower = -2.12194440e-4f;
  x = x < -105.0f ? -105.0f : x;  // exp is 0 below; NaN passes both comparisons
  x = x > 89.0f ? 89.0f : x;      // exp overflows above
  const float shifted = x * 1.44269504088896341f + kShift;
  const float exponent = shifted - kShift;
  float r = x - exponent * kLog2Upper;
  r = r - exponent * kLog2Lower;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^exponent in two factors, so that subnormal results and those next to overflow are right.
  // Unsigned, because the bits of a NaN are anything.
  const uint32_t power = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kShift);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(power) >> 1);
  const float first = std::bit_cast<float>((half + 127u) << 23);
  const float second = std::bit_cast<float>((power - half + 127u) << 23);
  return p * first * second;
}

/// 1 / (1 + exp(-x)).
FOMOE_HOST_DEVICE FOMOE_INLINE double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }
FOMOE_HOST_DEVICE FOMOE_INLINE float logistic(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + __expf(-x));  // to 2 units in the last place or so
#else
  return 1.0f / (1.0f + exponential(-x));
#endif
}

}  // namespace fomoe
