// SPDX-License-Identifier: Apache-2.0
// mbarriers, by which threads and asynchronous copies tell one another about stages of shared
// memory. Hopper only.
#pragma once

#include "cuda/memory.cuh"

namespace fomoe::cuda {

/// Lies in shared memory. A phase of it ends when all arrivals and all expected bytes have come.
struct alignas(8) Mbarrier {
  uint64_t state;
};

#ifdef FOMOE_EMULATION

inline void init(Mbarrier& barrier, int arrivals) { emulation::mbarrier_init(&barrier, arrivals); }
inline void fence_barrier_init() {}
inline void arrive(Mbarrier& barrier) { emulation::mbarrier_arrive(&barrier); }
inline void arrive_and_expect(Mbarrier& barrier, int bytes) {
  emulation::mbarrier_arrive(&barrier, bytes);
}
inline void arrive_after_copies(Mbarrier& barrier) {
  emulation::mbarrier_arrive_after_copies(&barrier);
}
inline void wait(Mbarrier& barrier, int parity) { emulation::mbarrier_wait(&barrier, parity); }

#else

FOMOE_DEVICE void init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
/// After the inits, before __syncthreads.
FOMOE_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FOMOE_DEVICE void arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
/// Arrives, and makes the phase wait for `bytes` more bytes of asynchronous loads.
FOMOE_DEVICE void arrive_and_expect(Mbarrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
/// Arrives once the thread's cp_async_16 so far are complete; does not block.
FOMOE_DEVICE void arrive_after_copies(Mbarrier& barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
      : "memory");
}
/// Returns once the phase of this parity is over. The first phase has parity 0; before it ends,
/// that of parity 1 counts as over.
FOMOE_DEVICE void wait(Mbarrier& barrier, int parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra wait_%=;\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

#endif

}  // namespace fomoe::cuda
