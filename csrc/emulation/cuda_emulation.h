// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests on machines without a GPU: included ahead of a .cu file
// that is compiled as C++ (-include). Each thread of a block is a fiber, a block runs on one thread
// of the operating system, and blocks run in parallel.
//
// Found out: barriers that not all threads reach, deadlocks (reported, not hung), a missing
// __syncthreads (threads run in a random order that EMULATION_SEED changes), warp collectives whose
// lanes disagree, misaligned accesses, overruns of global and shared memory (under
// AddressSanitizer), shared memory that is read before it is written (it starts as NaN), and wrong
// use of asynchronous copies, mbarriers, TMA and wgmma: see copies.h, barrier.h, tma.h, wgmma.h.
// counters.h tells bytes, sectors and bank conflicts.
//
// Not seen:
//  * Orders of the threads finer than from one barrier, collective or wait to the next: a fiber
//    runs that far without the others, and lanes of a warp are never in lockstep. A race inside of
//    one such step, say of two read-modify-writes without an atomic, goes unnoticed, and so does a
//    missing __syncwarp between lanes where no order of whole steps shows it.
//  * Races between blocks, but for what parallel threads of the operating system happen to show.
//  * The memory model: everything is visible at once and in order, so that a missing __threadfence
//    or a wrong scope of a fence changes nothing. Of the fences only that of the asynchronous proxy
//    is modelled, in the shared memory of the own block.
//  * Clusters, multicast and the memory of other blocks; graphs, streams and their order (a launch
//    is over when it returns), devices, and the host reading memory too early.
//  * How hardware rounds inside: mma and wgmma sum in ascending k in float32, and exp, division and
//    the like are those of the C library.
//  * What the compiler makes of the source: registers, spills, serialised wgmma, wrong PTX in the
//    wrappers (the models take their place). tools/check_kernels.py looks at some of it.
//  * Whether the registers of a block suffice, and shared memory beyond the 163 KiB of sm_80 in a
//    kernel for it (beyond the 227 KiB of sm_90 is refused).
//  * Time.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef FOMOE_EMULATION
#define FOMOE_EMULATION 1
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

#include "asynchronous.h"
#include "atomics.h"
#include "barrier.h"
#include "block.h"
#include "copies.h"
#include "counters.h"
#include "mma.h"
#include "tma.h"
#include "warp.h"
#include "wgmma.h"

#define threadIdx (::fomoe::emulation::fiber().thread_index)
#define blockIdx (::fomoe::emulation::block().block_index)
#define blockDim (::fomoe::emulation::block().block_size)
#define gridDim (::fomoe::emulation::block().grid_size)

inline void __syncthreads() { fomoe::emulation::barrier_sync(0, 0); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
