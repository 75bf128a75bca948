// SPDX-License-Identifier: Apache-2.0
// Warp collectives: every lane of the mask leaves its value, and reads those of the others once all
// have come.
#pragma once

#include <algorithm>
#include <cstring>

#include "block.h"

namespace fomoe::emulation {

/// Lets the lanes go whose collective is complete.
void complete_collectives(Warp& warp);

/// Waits for the lanes of the mask; their values are then in `outputs`.
Warp& meet(uint32_t mask, std::array<uint64_t, 2> value);

template <typename T>
inline Warp& meet_with(uint32_t mask, T value) {
  static_assert(sizeof(T) <= 16);
  std::array<uint64_t, 2> words = {};
  std::memcpy(words.data(), &value, sizeof(T));
  return meet(mask, words);
}

template <typename T>
inline T value_of(const Warp& warp, int lane) {
  T value;
  std::memcpy(&value, warp.outputs[lane].data(), sizeof(T));
  return value;
}

/// The value of lane `source` if it is in the same group of `width` lanes, else the lane's own.
template <typename T>
inline T shuffled(uint32_t mask, T value, int source, int width) {
  const Warp& warp = meet_with(mask, value);
  const int lane = fiber().lane;
  const bool same_group = source >= 0 && source < 32 && source / width == lane / width;
  if (same_group && !(mask >> source & 1)) fail("shuffle from a lane outside the mask");
  return value_of<T>(warp, same_group ? source : lane);
}

/// Combines the values of the mask's lanes in ascending order.
template <typename T, typename Combine>
inline T reduced(uint32_t mask, T value, const Combine& combine) {
  const Warp& warp = meet_with(mask, value);
  bool is_first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(warp.participants[fiber().lane] >> lane & 1)) continue;
    result = is_first ? value_of<T>(warp, lane) : combine(result, value_of<T>(warp, lane));
    is_first = false;
  }
  return result;
}

}  // namespace fomoe::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu) { fomoe::emulation::meet_with(mask, 0); }
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = fomoe::emulation::fiber().lane;
  return fomoe::emulation::shuffled(mask, value, lane / width * width + source % width, width);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return fomoe::emulation::shuffled(mask, value, fomoe::emulation::fiber().lane ^ bits, width);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int source = fomoe::emulation::fiber().lane + static_cast<int>(distance);
  return fomoe::emulation::shuffled(mask, value, source, width);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int source = fomoe::emulation::fiber().lane - static_cast<int>(distance);
  return fomoe::emulation::shuffled(mask, value, source, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned own = predicate ? 1u << fomoe::emulation::fiber().lane : 0u;
  return fomoe::emulation::reduced(mask, own, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  const fomoe::emulation::Warp& warp = fomoe::emulation::meet_with(mask, value);
  unsigned equal = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (warp.participants[fomoe::emulation::fiber().lane] >> lane & 1) {
      equal |= static_cast<unsigned>(fomoe::emulation::value_of<T>(warp, lane) == value) << lane;
    }
  }
  return equal;
}
template <typename T>
inline T __reduce_add_sync(unsigned mask, T value) {
  return fomoe::emulation::reduced(mask, value, [](T a, T b) { return a + b; });
}
template <typename T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return fomoe::emulation::reduced(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return fomoe::emulation::reduced(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
inline T __reduce_or_sync(unsigned mask, T value) {
  return fomoe::emulation::reduced(mask, value, [](T a, T b) { return a | b; });
}
