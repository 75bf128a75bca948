// SPDX-License-Identifier: Apache-2.0
// mbarrier. Found out: more arrivals than the barrier's count, use before initialisation, more
// bytes than were announced (the hardware would let them be announced later) and, as a deadlock
// that names the barriers, fewer.
#pragma once

#include <cstdint>

namespace fomoe::emulation {

void mbarrier_init(void* barrier, int count);
void mbarrier_arrive(void* barrier, int64_t expected_bytes = 0);
/// Bytes of an asynchronous load have come.
void mbarrier_complete(void* barrier, int64_t bytes);
/// Returns once the phase of this parity is over.
void mbarrier_wait(void* barrier, int parity);
/// cp.async.mbarrier.arrive.noinc: the thread's copies so far land, then it arrives.
void mbarrier_arrive_after_copies(void* barrier);

}  // namespace fomoe::emulation
