// SPDX-License-Identifier: Apache-2.0
#include "copies.h"

#include <cstring>

#include "asynchronous.h"
#include "counters.h"

namespace fomoe::emulation {

void cp_async(void* shared, const void* global, int valid_bytes, const void* site) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail("cp.async with an address that is not a multiple of 16");
  }
  note_access(Access::kSharedStore, shared, 16, site);
  if (valid_bytes > 0) note_access(Access::kGlobalLoad, global, valid_bytes, site);
  asynchronous().shared.begin_copy(shared, 16, "cp.async");
  std::memset(shared, 0xFF, 16);
  fiber().pending_copies.push_back([=] {
    std::memset(shared, 0, 16);
    if (valid_bytes > 0) std::memcpy(shared, global, valid_bytes);
    asynchronous().shared.end_copy(shared, 16, true);
  });
}

void cp_async_commit() {
  fiber().copy_groups.push_back(std::move(fiber().pending_copies));
  fiber().pending_copies.clear();
}

void cp_async_wait(int groups_in_flight) {
  auto& groups = fiber().copy_groups;
  while (static_cast<int>(groups.size()) > groups_in_flight) {
    for (auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

}  // namespace fomoe::emulation
