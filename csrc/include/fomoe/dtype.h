// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels and how each is read, accumulated and written.
#pragma once

#include <bit>
#include <cstdint>

#include "fomoe/host_device.h"

namespace fomoe {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

/// Upper half of an IEEE float32; rounding to it is to nearest, ties to even, as in torch.
struct BFloat16 {
  uint16_t bits;
};

FOMOE_HOST_DEVICE inline float to_accumulate(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

/// IEEE half precision. Converted with integer and float32 arithmetic, without branches, so that
/// loops over it vectorise on every instruction set; to nearest, ties to even, as in torch.
struct Float16 {
  uint16_t bits;
};

FOMOE_HOST_DEVICE inline float to_accumulate(Float16 value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  // No step is subnormal in float32, so that flushing those to zero changes nothing.
  const float subnormal = std::bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f;
  const uint32_t is_special = magnitude >= 0x0f800000u;  // infinity and NaN keep their payload
  const uint32_t normal = magnitude + ((is_special ? 224u : 112u) << 23);
  const uint32_t word = magnitude < 0x00800000u ? std::bit_cast<uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(word | sign);
}
FOMOE_HOST_DEVICE inline float to_accumulate(float value) { return value; }
FOMOE_HOST_DEVICE inline double to_accumulate(double value) { return value; }

/// The type sums are held in: float64 for float64, float32 for everything else.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

template <typename T>
FOMOE_HOST_DEVICE inline T from_accumulate(Accumulate<T> value) {
  return value;
}
template <>
FOMOE_HOST_DEVICE inline BFloat16 from_accumulate<BFloat16>(float value) {
  const uint32_t word = std::bit_cast<uint32_t>(value);
  const uint32_t round_to_even = 0x7fff + ((word >> 16) & 1);
  const uint32_t quiet_nan = (word >> 16) | 0x0040;
  return BFloat16{static_cast<uint16_t>(value != value ? quiet_nan : (word + round_to_even) >> 16)};
}
template <>
FOMOE_HOST_DEVICE inline Float16 from_accumulate<Float16>(float value) {
  const uint32_t word = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = word & 0x7fffffffu, sign = word >> 16 & 0x8000u;
  const uint32_t round_to_even = 0xfff + (magnitude >> 13 & 1);
  const uint32_t normal = (magnitude - (112u << 23) + round_to_even) >> 13;
  // Below the smallest normal half, adding 1/2 aligns the last bit of a subnormal half with that of
  // a float32, and rounds.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to more than the largest half
  half = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : half;
  return Float16{static_cast<uint16_t>(half | sign)};
}

/// Calls function(T{}) with the element type named by dtype.
template <typename Function>
inline void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(double{});
    case DType::kFloat32:
      return function(float{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
}

}  // namespace fomoe
