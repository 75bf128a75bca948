// SPDX-License-Identifier: Apache-2.0
#include "barrier.h"

#include "asynchronous.h"

namespace fomoe::emulation {

namespace {

MbarrierState& state_of(void* barrier) {
  auto& barriers = asynchronous().barriers;
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("an mbarrier is used before mbarrier.init");
  return found->second;
}

void end_phase_if_complete(MbarrierState& barrier) {
  ++block().progress;
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
}

}  // namespace

void mbarrier_init(void* barrier, int count) {
  if (shared_offset(barrier) % 8 != 0) fail("an mbarrier is not 8-byte aligned");
  asynchronous().barriers[barrier] = {.count = count, .pending = count};
}

void mbarrier_arrive(void* barrier, int64_t expected_bytes) {
  MbarrierState& state = state_of(barrier);
  if (state.pending == 0) fail("an mbarrier gets more arrivals in a phase than its count");
  state.bytes += expected_bytes;
  --state.pending;
  end_phase_if_complete(state);
}

void mbarrier_complete(void* barrier, int64_t bytes) {
  MbarrierState& state = state_of(barrier);
  state.bytes -= bytes;
  if (state.bytes < 0) fail("more bytes come than an mbarrier was told to expect");
  end_phase_if_complete(state);
}

void mbarrier_wait(void* barrier, int parity) {
  const MbarrierState& state = state_of(barrier);
  while (state.phase == parity) wait_as(FiberState::kPolling);
}

void mbarrier_arrive_after_copies(void* barrier) {
  Fiber& self = fiber();
  std::vector<std::function<void()>> copies;
  for (auto& group : self.copy_groups) {
    for (auto& copy : group) copies.push_back(std::move(copy));
  }
  for (auto& copy : self.pending_copies) copies.push_back(std::move(copy));
  self.copy_groups.clear();
  self.pending_copies.clear();
  defer([barrier, copies = std::move(copies)] {
    for (const auto& copy : copies) copy();
    mbarrier_arrive(barrier);
  });
}

}  // namespace fomoe::emulation
