// SPDX-License-Identifier: Apache-2.0
// permute: copies every token once per expert that executes it, grouped by expert.
//
//   rows[r] = x[row_to_slot[r] / K]      rows past the last executed row are zero
//
// Minimum traffic: read T*D, write R*D elements. Deterministic; x and rows must not overlap.
#pragma once

#include "fomoe/cuda.h"
#include "fomoe/dtype.h"
#include "fomoe/routing.h"

namespace fomoe {

namespace cpu {
/// x [T, width], rows [R, width], both dense, of type dtype. Reads row_to_slot only.
void permute(DType dtype, const void* x, const Routing& routing, int64_t width, void* rows);

/// The same for `count` rows from row `first` on; rows [count, width].
void permute_range(DType dtype, const void* x, const Routing& routing, int64_t width, int64_t first,
                   int64_t count, void* rows);
}  // namespace cpu

namespace cuda {
/// Reads slot_to_row and the last offset only.
void permute(DType dtype, const void* x, const Routing& routing, int64_t width, void* rows,
             Stream stream);
}  // namespace cuda

namespace reference {
void permute(const double* x, const Routing& routing, int64_t width, double* rows);
}  // namespace reference

}  // namespace fomoe
