// SPDX-License-Identifier: Apache-2.0
#include "tma.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "asynchronous.h"
#include "barrier.h"
#include "counters.h"

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

/// Calls function(shared offset of a line, address of its first element or nullptr if none exists,
/// bytes of it that exist).
template <typename Function>
void for_each_line(const BoxedArray& array, uint32_t shared, const int (&position)[5],
                   const Function& function) {
  const int64_t lines = bytes_of(array) / 128;
  for (int64_t line = 0; line < lines; ++line) {
    int64_t rest = line, offset = position[0];
    bool exists = 0 <= position[0] && position[0] < array.extents[0];
    for (int d = 1; d < array.rank; ++d) {
      const int64_t at = position[d] + rest % array.box[d];
      rest /= array.box[d];
      exists = exists && 0 <= at && at < array.extents[d];
      offset += at * array.strides[d];
    }
    const int64_t columns = std::min<int64_t>(array.box[0], array.extents[0] - position[0]);
    char* address = static_cast<char*>(array.data) + offset * kElementBytes;
    function(static_cast<uint32_t>(shared + line * 128), exists ? address : nullptr,
             exists ? columns * kElementBytes : 0);
  }
}

/// Calls function(shared pointer, offset in the line) for the elements of a swizzled line.
template <typename Function>
void for_each_element(uint32_t line, const Function& function) {
  for (uint32_t i = 0; i < 128; i += kElementBytes) {
    function(block().shared + swizzled(line + i), i);
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
  for_each_line(array, shared_offset(shared), position, [](uint32_t, char* from, int64_t size) {
    if (size > 0) note_bulk_access(Access::kGlobalLoad, from, size);
  });
  ++asynchronous().loads_under_way;
  std::array<int, 5> place;
  std::copy(std::begin(position), std::end(position), place.begin());
  defer([=] {
    if (block().alive == 0) return;
    int where[5];
    std::copy(place.begin(), place.end(), where);
    for_each_line(array, shared_offset(shared), where, [](uint32_t line, char* from, int64_t size) {
      for_each_element(line, [&](char* to, uint32_t i) {
        const char zero[kElementBytes] = {};
        std::memcpy(to, i < size ? from + i : zero, kElementBytes);
      });
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
  for_each_line(array, shared_offset(shared), position, [](uint32_t, char* to, int64_t size) {
    if (size > 0) note_bulk_access(Access::kGlobalStore, to, size);
  });
  std::array<int, 5> place;
  std::copy(std::begin(position), std::end(position), place.begin());
  thread_state().bulk_stores.push_back([=] {
    int where[5];
    std::copy(place.begin(), place.end(), where);
    for_each_line(array, shared_offset(shared), where, [](uint32_t line, char* to, int64_t size) {
      for_each_element(line, [&](const char* from, uint32_t i) {
        if (i < size) std::memcpy(to + i, from, kElementBytes);
      });
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
