// SPDX-License-Identifier: Apache-2.0
#include "warp.h"

namespace fomoe::emulation {

namespace {

/// Lets the lanes of `mask` go if all of them have come. A lane that has exited is not waited for.
void complete(Warp& warp, uint32_t mask) {
  const uint32_t wanted = mask & warp.members;
  if (((warp.arrived | warp.exited) & wanted) != wanted) return;
  for (int lane = 0; lane < 32; ++lane) {
    if (!((mask & warp.arrived) >> lane & 1)) continue;
    if (warp.masks[lane] != mask) fail("the lanes of a warp collective have different masks");
    warp.outputs[lane] = warp.inputs[lane];
    warp.participants[lane] = mask & warp.arrived;
    warp.lanes[lane]->state = FiberState::kReady;
  }
  warp.arrived &= ~mask;
  ++block().progress;
}

}  // namespace

void complete_collectives(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    if (warp.arrived >> lane & 1) complete(warp, warp.masks[lane]);
  }
}

Warp& meet(uint32_t mask, std::array<uint64_t, 2> value) {
  Fiber& self = fiber();
  Warp& warp = *self.warp;
  if (!(mask >> self.lane & 1)) fail("a lane outside the mask takes part in a warp collective");
  warp.inputs[self.lane] = value;
  warp.masks[self.lane] = mask;
  self.meetings += mask == 0xffffffffu;
  warp.arrived |= 1u << self.lane;
  self.state = FiberState::kInWarpCollective;
  complete(warp, mask);
  if (self.state == FiberState::kInWarpCollective) wait_as(FiberState::kInWarpCollective);
  return warp;
}

}  // namespace fomoe::emulation
