// SPDX-License-Identifier: Apache-2.0
// wgmma of 64 x n x 16 with both operands in shared memory. The product is computed when the
// warpgroup waits for it, as late as allowed. Found out: an accumulator that is read (it holds NaN)
// or written before that, one that was written after wgmma.fence or without it, operands that were
// written without fence.proxy.async, operands overwritten before the wait, and threads of a
// warpgroup that disagree. Sums ascend in k; the order in the hardware is unknown.
#pragma once

#include <array>
#include <cstdint>

namespace fomoe::emulation {

struct WgmmaShape {
  int n;
  bool a_is_mn_major, b_is_mn_major;
  float (*to_float)(uint16_t bits);

  bool operator==(const WgmmaShape&) const = default;
};

struct WgmmaInstruction {
  uint64_t a, b;  // descriptors
  WgmmaShape shape;
  bool accumulate;
  int issued = 0;  // threads that have come so far
  std::array<float*, 128> accumulators = {};
};

void wgmma_fence(float* accumulator, int count);
void wgmma(float* accumulator, uint64_t a, uint64_t b, const WgmmaShape& shape, bool accumulate);
void wgmma_commit();
void wgmma_wait(int groups_in_flight);

}  // namespace fomoe::emulation
