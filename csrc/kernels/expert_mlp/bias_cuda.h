// SPDX-License-Identifier: Apache-2.0
// What the biases take from the backward on CUDA, and the end of the weights' gradient.
#pragma once

#include "fomoe/expert_mlp.h"
#include "grouped_gemm/products.h"

namespace fomoe::cuda {

/// out[e] = sum over the rows r of expert e of scale(r) * source[r], added in the accumulation type
/// in an order that depends on the offsets only, rounded once; zero for an expert without rows.
/// d_b1: source = rows of d_pre. d_b2: source = the tokens of grad_y, scaled by the weights.
struct ExpertSums {
  DType dtype;
  RowSource source;     // width `width`
  const void* weights;  // [T * K] accumulation type: scale(r) = weights[source.slots[r]]; or
                        // nullptr: 1
  int64_t width;
  int64_t num_rows;     // R
  int64_t num_experts;  // E
  RowTiles tiles;
  void* out;  // [E, width], dense
};

/// Bytes of the workspace of sum_expert_rows.
int64_t expert_sums_bytes(DType dtype, int64_t width, int64_t num_rows, int64_t num_experts);
void sum_expert_rows(const ExpertSums& sums, void* workspace, Stream stream);

/// d_weights[slot] = sum over i, ascending, of weight_parts[row of slot, i]; plus <grad_y[token],
/// b2[e]>, added up in a fixed order, if there is a b2; zero for a skipped slot.
struct WeightGradient {
  DType dtype;
  const void* weight_parts;  // [R, num_parts] accumulation type
  int64_t num_parts;
  const void* grad_y;  // [T, dim], dense; read with b2 only
  const void* b2;      // [E, dim], dense, or nullptr
  int64_t dim;
  Routing routing;
  void* d_weights;  // [T, K] accumulation type
};

void finish_weight_gradient(const WeightGradient& gradient, Stream stream);

}  // namespace fomoe::cuda
