// SPDX-License-Identifier: Apache-2.0
// ldmatrix, stmatrix and mma.sync, as PTX describes their fragments.
#pragma once

#include <cstdint>

namespace fomoe::emulation {

/// ldmatrix.x4 of 8 x 8 elements of 2 bytes: lane 8 i + r names row r of matrix i, 16 bytes; lane l
/// gets of each matrix the elements (l / 4, 2 (l % 4) + {0, 1}), transposed those at the mirrored
/// places.
void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed, const void* site);

/// stmatrix.x4, the reverse of ldmatrix.x4.
void store_matrices(void* row, const uint32_t (&registers)[4], const void* site);

/// mma.m16n8k16: sums += left right, left 16 x 16 and right 16 x 8 of elements that `to_float`
/// reads. Sums in ascending k, each step rounded to float32; the order in the hardware is unknown.
void multiply_matrices(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                       float (*to_float)(uint16_t bits));

}  // namespace fomoe::emulation
