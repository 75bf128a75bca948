// SPDX-License-Identifier: Apache-2.0
// Lays arrays out in memory that the caller owns.
#pragma once

#include <cstdint>

namespace fomoe {

/// Hands out consecutive pieces. Over a null base it only counts, so that the code that lays a
/// workspace out is also the one that says how many bytes it takes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }

  void* take_bytes(int64_t bytes) {
    void* piece = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  int64_t bytes() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 64;  // a cache line
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fomoe
