// SPDX-License-Identifier: Apache-2.0
// One launch lists the tiles, one multiplies, one clears the rows past the last executed one.
#include "fomoe/grouped_gemm.h"
#include "grouped_gemm/products.h"

namespace fomoe::cuda {

int64_t grouped_gemm_workspace_bytes(int64_t num_rows, int64_t num_local_experts) {
  return row_tiles_bytes(num_rows, num_local_experts);
}

void grouped_gemm(KernelPath path, const void* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, void* out, void* workspace, Stream stream) {
  RowProduct product = {};
  product.source = {rows, num_rows, nullptr, 0};
  product.b = b;
  product.num_rows = num_rows;
  product.tiles = list_row_tiles(offsets, b.num_experts, num_rows, workspace, stream);
  product.epilogue = Epilogue::kStore;
  product.out = out;
  multiply(path, product, stream);
  zero_rows_past_end(offsets, b.num_experts, num_rows, b.cols * size_of(b.dtype), out, stream);
}

void grouped_gemm_wgrad(KernelPath path, DType dtype, const void* left, const void* right,
                        int64_t num_rows, const int32_t* offsets, int64_t num_local_experts,
                        int64_t out_rows, int64_t out_cols, void* out, Stream stream) {
  const RowSource left_rows = {left, num_rows, nullptr, 0};
  const RowSource right_rows = {right, num_rows, nullptr, 0};
  multiply(path,
           WeightProduct{dtype, left_rows, right_rows, num_rows, offsets, num_local_experts,
                         out_rows, out_cols, out},
           stream);
}

}  // namespace fomoe::cuda
