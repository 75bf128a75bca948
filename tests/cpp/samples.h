// SPDX-License-Identifier: Apache-2.0
// Inputs that the C++ tests share: arrays of any dtype, random routings, tolerances.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "fomoe/dtype.h"
#include "fomoe/route.h"
#include "fomoe/routing.h"
#include "harness.h"

namespace samples {

using fomoe::DType;

inline constexpr DType kAllDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                       DType::kFloat16};

inline DType accumulate_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

/// Bound on the error, relative to the largest value, of a result that is rounded once.
inline double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 4e-15;
    case DType::kFloat32:
      return 1e-6;
    case DType::kBFloat16:
      return 4e-3;
    case DType::kFloat16:
      return 5e-4;
  }
  return 0;
}

/// Hands out memory that begins at a cache line.
template <typename T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <typename U>
  explicit CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t{64}); }
  bool operator==(const CacheLineAllocator&) const { return true; }
};

/// Elements of any dtype. They begin one element after a cache line, the worst alignment that a
/// tensor can have, in memory that ends with them, so that the sanitizer sees an overrun.
class Array {
 public:
  /// NaN everywhere: what a kernel leaves unwritten shows.
  Array(DType dtype, int64_t count) : Array(dtype, std::vector<double>(count, NAN)) {}

  Array(DType dtype, const std::vector<double>& values)
      : dtype_(dtype), bytes_((1 + values.size()) * fomoe::size_of(dtype)) {
    fomoe::dispatch(dtype, [&](auto tag) {
      using T = decltype(tag);
      T* elements = static_cast<T*>(data());
      for (const double value : values) {
        *elements++ = fomoe::from_accumulate<T>(static_cast<fomoe::Accumulate<T>>(value));
      }
    });
  }

  void* data() { return bytes_.data() + fomoe::size_of(dtype_); }
  const void* data() const { return bytes_.data() + fomoe::size_of(dtype_); }
  const auto& bytes() const { return bytes_; }

  /// What the kernel sees, in double.
  std::vector<double> values() const {
    std::vector<double> result(bytes_.size() / fomoe::size_of(dtype_) - 1);
    fomoe::dispatch(dtype_, [&](auto tag) {
      const auto* elements = static_cast<const decltype(tag)*>(data());
      for (double& value : result) value = fomoe::to_accumulate(*elements++);
    });
    return result;
  }

 private:
  DType dtype_;
  std::vector<char, CacheLineAllocator<char>> bytes_;
};

/// A routing and the memory behind it, whose indices begin one after a cache line.
class OwnedRouting {
 public:
  OwnedRouting(const std::vector<int32_t>& ids, int64_t top_k,
               const std::vector<int32_t>& expert_map, int64_t num_local_experts)
      : slot_to_row_(1 + ids.size()),
        row_to_slot_(1 + ids.size()),
        offsets_(1 + num_local_experts + 1) {
    const auto num_slots = static_cast<int64_t>(ids.size());
    fomoe::reference::route(ids.data(), num_slots, expert_map.data(), num_local_experts,
                            fomoe::kDropless, slot_to_row_.data() + 1, row_to_slot_.data() + 1,
                            offsets_.data() + 1);
    view = {slot_to_row_.data() + 1,
            row_to_slot_.data() + 1,
            offsets_.data() + 1,
            num_slots / top_k,
            top_k,
            num_local_experts};
  }

  fomoe::Routing view;

 private:
  std::vector<int32_t, CacheLineAllocator<int32_t>> slot_to_row_, row_to_slot_, offsets_;
};

/// Ids in [-1, num_experts).
inline std::vector<int32_t> random_ids(int64_t count, int32_t num_experts, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(engine() % (num_experts + 1)) - 1;
  return ids;
}

/// Five experts of which 1 and 3 are ghosts and 4 is local expert 0.
inline OwnedRouting random_routing(int64_t num_tokens, int64_t top_k, uint32_t seed) {
  return OwnedRouting(random_ids(num_tokens * top_k, 5, seed), top_k, {1, -1, 2, -1, 0}, 3);
}

/// Largest difference relative to the largest expected value; absolute if all of them are zero.
inline double relative_error(const std::vector<double>& actual,
                             const std::vector<double>& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double error = 0, size = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::abs(actual[i] - expected[i]);
    if (!std::isfinite(difference)) return INFINITY;
    error = std::max(error, difference);
    size = std::max(size, std::abs(expected[i]));
  }
  return size > 0 ? error / size : error;
}

}  // namespace samples

#define CHECK_ALL_CLOSE(actual, expected, tolerance) \
  CHECK_CLOSE(samples::relative_error(actual, expected), 0.0, tolerance)
