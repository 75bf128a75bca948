// SPDX-License-Identifier: Apache-2.0
// Two elements of BFloat16 or Float16 in one word, the first in its lower half.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "fomoe/dtype.h"

namespace fomoe::cuda {

struct Pair {
  float first, second;
};

#ifdef FOMOE_EMULATION

/// Rounds to nearest, ties to even.
template <typename T>
inline uint32_t pack(float first, float second) {
  return from_accumulate<T>(first).bits | uint32_t{from_accumulate<T>(second).bits} << 16;
}

template <typename T>
inline Pair unpack(uint32_t word) {
  return {to_accumulate(T{static_cast<uint16_t>(word)}),
          to_accumulate(T{static_cast<uint16_t>(word >> 16)})};
}

#else

template <typename T>
FOMOE_DEVICE uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
}

template <typename T>
FOMOE_DEVICE Pair unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    Pair pair;
    asm("{\n .reg .f16 low, high;\n mov.b32 {low, high}, %2;\n"
        " cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
        : "=f"(pair.first), "=f"(pair.second)
        : "r"(word));
    return pair;
  }
}

#endif

}  // namespace fomoe::cuda
