// SPDX-License-Identifier: Apache-2.0
// What probes need and kernels do not: waits that give up, TMA of four dimensions, and shared
// memory as a plain matrix.
#pragma once

#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace probes {

using fomoe::BFloat16;
using fomoe::cuda::Mbarrier;
using fomoe::cuda::TensorMap;

/// Whether the phase ended within about a second; a kernel that hangs would take the GPU with it.
FOMOE_DEVICE bool wait_bounded(Mbarrier& barrier, int parity) {
#ifdef FOMOE_EMULATION
  wait(barrier, parity);  // reports a deadlock by itself
  return true;
#else
  constexpr long long kCycles = 2'000'000'000;
  for (const long long begin = clock64(); clock64() - begin < kCycles;) {
    int over;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(fomoe::cuda::shared_address(&barrier)), "r"(parity)
        : "memory");
    if (over) return true;
  }
  return false;
#endif
}

#ifndef FOMOE_EMULATION
FOMOE_DEVICE void tma_load_4d(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y,
                              int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(fomoe::cuda::shared_address(shared)),
      "l"(&map), "r"(fomoe::cuda::shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
FOMOE_DEVICE void tma_store_4d(const TensorMap& map, const void* shared, int x, int y, int z,
                               int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(fomoe::cuda::shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
#endif

/// Byte offset of element (line, column) of lines of 64 with 128-byte swizzle.
FOMOE_DEVICE int swizzled(int line, int column) {
  return line * 128 + ((column / 8 ^ line % 8) << 4) + column % 8 * 2;
}

}  // namespace probes
