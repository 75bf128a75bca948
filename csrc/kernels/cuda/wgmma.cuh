// SPDX-License-Identifier: Apache-2.0
// wgmma: products of 64 x n x 16 by the four warps of a warpgroup, operands in shared memory.
// sm_90a only.
//
// Operands lie in lines of 128 bytes (64 elements) with 128-byte swizzle, at multiples of 1024
// bytes. K-major: a line holds 64 consecutive k of one row m (or column n). MN-major: a line holds
// 64 consecutive m (or n) of one k; further 64 lie a slab of lines later.
//
// Accumulators: thread t of the warpgroup has rows t / 32 * 16 + t % 32 / 4 (+ 8) and columns
// 8 j + t % 4 * 2 (+ 1), as sums[4 j + {0, 1}] (+ 2 for the second row). Between wgmma_fence and
// the wgmma_wait that covers them, no other instruction touches them.
#pragma once

#include <type_traits>

#include "cuda/memory.cuh"
#include "fomoe/dtype.h"

namespace fomoe::cuda {

enum class Major { kK, kMN };

/// Bytes from one k = 16 step of an operand to the next, within its 64 k of K-major lines, or in
/// lines of MN-major ones.
template <Major major>
inline constexpr int kStepBytes = major == Major::kK ? 32 : 16 * 128;

/// slab_bytes: from 64 m (or n) to the next 64, for MN-major operands.
template <Major major>
FOMOE_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t slab_bytes) {
  constexpr uint64_t kEightLines = 1024, kSwizzle128 = uint64_t{1} << 62;
  const uint64_t leading = major == Major::kMN ? slab_bytes : 0;
  return uint64_t{address >> 4 & 0x3fff} | leading >> 4 << 16 | kEightLines >> 4 << 32 |
         kSwizzle128;
}

#ifdef FOMOE_EMULATION

inline int volatile_lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
inline uint32_t wgmma_address(const void* shared) { return emulation::shared_offset(shared); }

template <int registers>
inline void wgmma_fence(float (&sums)[registers]) {
  emulation::wgmma_fence(sums, registers);
}
template <typename T, Major a_major, Major b_major, int registers>
inline void wgmma(float (&sums)[registers], uint64_t a, uint64_t b, bool accumulate) {
  const auto to_float = [](uint16_t bits) { return to_accumulate(T{bits}); };
  emulation::wgmma(sums, a, b,
                   {2 * registers, a_major == Major::kMN, b_major == Major::kMN, to_float},
                   accumulate);
}
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int groups_in_flight>
inline void wgmma_wait() {
  emulation::wgmma_wait(groups_in_flight);
}
template <int registers>
inline void release_registers() {}
template <int registers>
inline void claim_registers() {}

#else

/// Index of the lane. What is computed from it is computed anew in every round of a loop, instead
/// of taking registers beside the accumulators all the time.
FOMOE_DEVICE int volatile_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

FOMOE_DEVICE uint32_t wgmma_address(const void* shared) { return shared_address(shared); }

/// Before the first wgmma, and after other instructions wrote accumulators.
template <int registers>
FOMOE_DEVICE void wgmma_fence(float (&)[registers]) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// clang-format off
#define FOMOE_SUMS_8(i) \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), \
  "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define FOMOE_SUMS_32(i) \
  FOMOE_SUMS_8(i), FOMOE_SUMS_8(i + 8), FOMOE_SUMS_8(i + 16), FOMOE_SUMS_8(i + 24)
#define FOMOE_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FOMOE_NAMES_128 FOMOE_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FOMOE_WGMMA_128(type) \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
    " {" FOMOE_NAMES_64 "}, %64, %65, accumulate, 1, 1, %67, %68;\n}" \
    : FOMOE_SUMS_32(0), FOMOE_SUMS_32(32) \
    : "l"(a), "l"(b), "r"(keep), "n"(a_transposed), "n"(b_transposed))
#define FOMOE_WGMMA_256(type) \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type \
    " {" FOMOE_NAMES_128 "}, %128, %129, accumulate, 1, 1, %131, %132;\n}" \
    : FOMOE_SUMS_32(0), FOMOE_SUMS_32(32), FOMOE_SUMS_32(64), FOMOE_SUMS_32(96) \
    : "l"(a), "l"(b), "r"(keep), "n"(a_transposed), "n"(b_transposed))
// clang-format on

/// sums = a b, or += with `accumulate`, for n = 2 * registers: 128 or 256.
template <typename T, Major a_major, Major b_major, int registers>
FOMOE_DEVICE void wgmma(float (&sums)[registers], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(registers == 64 || registers == 128);
  constexpr int a_transposed = a_major == Major::kMN, b_transposed = b_major == Major::kMN;
  const int keep = accumulate;
  if constexpr (registers == 64 && std::is_same_v<T, BFloat16>) FOMOE_WGMMA_128("bf16");
  if constexpr (registers == 64 && std::is_same_v<T, Float16>) FOMOE_WGMMA_128("f16");
  if constexpr (registers == 128 && std::is_same_v<T, BFloat16>) FOMOE_WGMMA_256("bf16");
  if constexpr (registers == 128 && std::is_same_v<T, Float16>) FOMOE_WGMMA_256("f16");
}

#undef FOMOE_SUMS_8
#undef FOMOE_SUMS_32
#undef FOMOE_NAMES_64
#undef FOMOE_NAMES_128
#undef FOMOE_WGMMA_128
#undef FOMOE_WGMMA_256

FOMOE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups_in_flight>
FOMOE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_in_flight) : "memory");
}
/// By all warps of a warpgroup: leaves each thread `registers`, a multiple of 8.
template <int registers>
FOMOE_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
FOMOE_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

#endif

}  // namespace fomoe::cuda
