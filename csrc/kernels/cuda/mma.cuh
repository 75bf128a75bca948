// SPDX-License-Identifier: Apache-2.0
// Tensor core products of one warp (mma.sync), and the loads and stores of fragments (ldmatrix,
// stmatrix). Every lane of the warp takes part.
#pragma once

#include <type_traits>

#include "cuda/memory.cuh"
#include "fomoe/dtype.h"

namespace fomoe::cuda {

#ifdef FOMOE_EMULATION

/// Loads four 8 x 8 matrices of 2-byte elements from shared memory. Lane 8 i + r names row r of
/// matrix i, 16 aligned bytes. fragments[i] of lane l holds elements (l / 4, 2 (l % 4) + {0, 1}) of
/// matrix i; if transposed, elements (2 (l % 4) + {0, 1}, l / 4).
template <bool transposed>
__attribute__((noinline)) inline void load_matrices(uint32_t (&fragments)[4], const void* row) {
  emulation::load_matrices(fragments, row, transposed, __builtin_return_address(0));
}

/// The reverse of load_matrices<false>. From Hopper on.
__attribute__((noinline)) inline void store_matrices(void* row, const uint32_t (&fragments)[4]) {
  emulation::store_matrices(row, fragments, __builtin_return_address(0));
}

/// sums (16 x 8) += left (16 x 16) right (16 x 8), T = BFloat16 or Float16. With g = lane / 4 and
/// p = 2 (lane % 4) + {0, 1}: left[i] holds elements (g + 8 (i % 2), p + 8 (i / 2)), right[i]
/// elements (p + 8 i, g), and sums[2 i + {0, 1}] elements (g + 8 i, p).
template <typename T>
inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                         uint32_t right1) {
  emulation::multiply_matrices(sums, left, {right0, right1},
                               [](uint16_t bits) { return to_accumulate(T{bits}); });
}

#else

template <bool transposed>
FOMOE_DEVICE void load_matrices(uint32_t (&fragments)[4], const void* row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

FOMOE_DEVICE void store_matrices(void* row, const uint32_t (&fragments)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(fragments[0]), "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
      : "memory");
}

template <typename T>
FOMOE_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                               uint32_t right1) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
}

#endif

}  // namespace fomoe::cuda
