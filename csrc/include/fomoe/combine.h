// SPDX-License-Identifier: Apache-2.0
// combine: every token gathers the rows its experts made of it, weighted.
//
//   y[t] = sum_k weights[t, k] * rows[slot_to_row[t, k]]      skipped paths add nothing
//
// The sum runs over ascending k in the accumulation type and is rounded once. Rows that no slot
// points to are never read. Minimum traffic: read R*D, write T*D elements; the backward reads
// T*D + R*D and writes R*D.
#pragma once

#include "fomoe/cuda.h"
#include "fomoe/dtype.h"
#include "fomoe/routing.h"

namespace fomoe {

namespace cpu {
/// rows [R, width], y [T, width], dense, of type dtype; weights [T, K] of its accumulation type, or
/// nullptr for ones.
void combine(DType dtype, const void* rows, const void* weights, const Routing& routing,
             int64_t width, void* y);

/// d_rows[r] = weights[slot] * grad_y[t], zero past the last executed row;
/// d_weights[slot] = <grad_y[t], rows[r]>, zero for a skipped path. One pass over the rows.
void combine_backward(DType dtype, const void* grad_y, const void* rows, const void* weights,
                      const Routing& routing, int64_t width, void* d_rows, void* d_weights);
}  // namespace cpu

namespace cuda {
/// As on the CPU, with the same y and d_rows to the bit.
void combine(DType dtype, const void* rows, const void* weights, const Routing& routing,
             int64_t width, void* y, Stream stream);
void combine_backward(DType dtype, const void* grad_y, const void* rows, const void* weights,
                      const Routing& routing, int64_t width, void* d_rows, void* d_weights,
                      Stream stream);
}  // namespace cuda

namespace reference {
void combine(const double* rows, const double* weights, const Routing& routing, int64_t width,
             double* y);
void combine_backward(const double* grad_y, const double* rows, const double* weights,
                      const Routing& routing, int64_t width, double* d_rows, double* d_weights);
}  // namespace reference

}  // namespace fomoe
