// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels and how each is read, accumulated and written.
#pragma once

#include <cstdint>
#include <cstring>

namespace fomoe {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16 };

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
      return 2;
  }
  return 0;
}

/// Upper half of an IEEE float32; rounding to it is to nearest, ties to even, as in torch.
struct BFloat16 {
  uint16_t bits;
};

inline float to_accumulate(BFloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}
inline float to_accumulate(float value) { return value; }
inline double to_accumulate(double value) { return value; }

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
inline T from_accumulate(Accumulate<T> value) {
  return value;
}
template <>
inline BFloat16 from_accumulate<BFloat16>(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (value != value) return BFloat16{static_cast<uint16_t>((word >> 16) | 0x0040)};  // stay NaN
  const uint32_t round_to_even = 0x7fff + ((word >> 16) & 1);
  return BFloat16{static_cast<uint16_t>((word + round_to_even) >> 16)};
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
  }
}

}  // namespace fomoe
