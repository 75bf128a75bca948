// SPDX-License-Identifier: Apache-2.0
#include "tma.h"

#include <array>
#include <cstring>
#include <stdexcept>

#include "asynchronous.h"
#include "barrier.h"

namespace fomoe::emulation {

namespace {

constexpr int kElementBytes = 2;

int64_t bytes_of(const BoxedArray& array) {
  int64_t elements = 1;
  for (int d = 0; d < array.rank; ++d) elements *= array.box[d];
  return elements * kElementBytes;
}

void check_box(const BoxedArray& array, const void* shared) {
  if (shared_offset(shared) % 1024 != 0) {
    fail("a TMA box with 128-byte swizzle is not 1024-byte aligned in shared memory");
  }
  if (array.box[0] * kElementBytes != 128) fail("a swizzled TMA box is not 128 bytes wide");
}

/// Calls function(shared offset of the element, its address or nullptr if it is out of bounds).
template <typename Function>
void for_each_element(const BoxedArray& array, uint32_t shared, const int (&position)[5],
                      const Function& function) {
  const int64_t lines = bytes_of(array) / 128;
  for (int64_t line = 0; line < lines; ++line) {
    int64_t rest = line, offset = 0;
    bool inside = true;
    for (int d = 1; d < array.rank; ++d) {
      const int64_t at = position[d] + rest % array.box[d];
      rest /= array.box[d];
      inside = inside && 0 <= at && at < array.extents[d];
      offset += at * array.strides[d];
    }
    for (int i = 0; i < array.box[0]; ++i) {
      const int64_t at = int64_t{position[0]} + i;
      char* address = static_cast<char*>(array.data) + (offset + at) * kElementBytes;
      const bool is_element = inside && 0 <= at && at < array.extents[0];
      function(swizzled(static_cast<uint32_t>(shared + line * 128 + i * kElementBytes)),
               is_element ? address : nullptr);
    }
  }
}

}  // namespace

void check_array(const BoxedArray& array) {
  bool fits = reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && array.strides[0] == 1;
  for (int d = 0; d < array.rank; ++d) {
    const int64_t stride_bytes = array.strides[d] * kElementBytes;
    fits = fits && 0 < array.box[d] && array.box[d] <= 256 && 0 < array.extents[d] &&
           array.extents[d] <= int64_t{1} << 32;
    if (d > 0) {
      fits = fits && stride_bytes % 16 == 0 && 0 < stride_bytes && stride_bytes < int64_t{1} << 40;
    }
  }
  if (!fits) throw std::runtime_error("a tensor map that the hardware does not allow");
}

void tma_load(void* shared, const BoxedArray& array, void* barrier, const int (&position)[5]) {
  check_box(array, shared);
  const int64_t bytes = bytes_of(array);
  asynchronous().shared.begin_copy(shared, bytes, "a TMA load");
  std::memset(shared, 0xFF, bytes);
  ++asynchronous().loads_under_way;
  std::array<int, 5> place;
  std::copy(std::begin(position), std::end(position), place.begin());
  defer([=] {
    if (block().alive == 0) return;
    int where[5];
    std::copy(place.begin(), place.end(), where);
    for_each_element(array, shared_offset(shared), where, [](uint32_t to, const char* from) {
      const char zero[kElementBytes] = {};
      std::memcpy(block().shared + to, from ? from : zero, kElementBytes);
    });
    asynchronous().shared.end_copy(shared, bytes, false);
    --asynchronous().loads_under_way;
    mbarrier_complete(barrier, bytes);
  });
}

void tma_store(const BoxedArray& array, const void* shared, const int (&position)[5]) {
  check_box(array, shared);
  const int64_t bytes = bytes_of(array);
  asynchronous().shared.begin_read(SharedState::Reader::kStore, shared, bytes);
  std::array<int, 5> place;
  std::copy(std::begin(position), std::end(position), place.begin());
  thread_state().bulk_stores.push_back([=] {
    int where[5];
    std::copy(place.begin(), place.end(), where);
    for_each_element(array, shared_offset(shared), where, [](uint32_t from, char* to) {
      if (to) std::memcpy(to, block().shared + from, kElementBytes);
    });
    asynchronous().shared.end_read(SharedState::Reader::kStore, shared, bytes);
  });
}

void tma_commit() {
  ThreadState& thread = thread_state();
  thread.bulk_groups.push_back(std::move(thread.bulk_stores));
  thread.bulk_stores.clear();
}

void tma_wait_read(int groups_in_flight) {
  auto& groups = thread_state().bulk_groups;
  while (static_cast<int>(groups.size()) > groups_in_flight) {
    for (const auto& store : groups.front()) store();
    groups.pop_front();
  }
}

void fence_async_proxy() { asynchronous().shared.fence_proxy(); }

}  // namespace fomoe::emulation
