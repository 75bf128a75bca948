// SPDX-License-Identifier: Apache-2.0
// The products of the sm80 family. This file: which kernel computes a RowProduct, and
// WeightProduct, where a block owns a tile of one expert's gradient and the depth is the rows of
// the expert.
#include "grouped_gemm/sm80_rows.cuh"

namespace fomoe::cuda::sm80 {
namespace {

FOMOE_DEVICE int clamped(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    weight_product_kernel(const __grid_constant__ WeightProduct product,
                          const __grid_constant__ GatheredSource left_source,
                          const __grid_constant__ GatheredSource right_source) {
  auto& shared = dynamic_shared<Shared>();
  const int64_t row_tiles = ceil_div(product.out_rows, kTileRows);
  const int64_t col_tiles = ceil_div(product.out_cols, kTileCols);
  const int64_t expert = blockIdx.x / (row_tiles * col_tiles);
  const int64_t in_expert = blockIdx.x - expert * row_tiles * col_tiles;
  const int64_t row_tile = in_expert % row_tiles, col_tile = in_expert / row_tiles;
  const auto num_rows = static_cast<int>(product.num_rows);
  const int begin = clamped(load_global(product.offsets + expert), 0, num_rows);
  const int end = clamped(load_global(product.offsets + expert + 1), begin, num_rows);

  const int chunk = Layout<Lines::kAcross>::chunk();
  const Columns rows = consecutive_columns(row_tile, product.out_rows);
  const Columns columns = consecutive_columns(col_tile, product.out_cols);
  GatheredLines left(left_source, begin, end, rows.of_chunk(chunk));
  GatheredLines right(right_source, begin, end, columns.of_chunk(chunk));
  Sums sums;
  multiply_tile<T, Lines::kAcross, Lines::kAcross>(
      shared, (end - begin + kTileDepth - 1) / kTileDepth, left, right, sums);
  __syncthreads();
  store_sums(shared, sums);
  __syncthreads();
  const int64_t first = row_tile * kTileRows, left_over = product.out_rows - first;
  store_rows<T>(shared, columns, static_cast<int>(left_over < kTileRows ? left_over : kTileRows),
                product.out_cols, nullptr, 0,
                eight_at<T>(product.out, (expert * product.out_rows + first) * product.out_cols));
}

}  // namespace

int64_t num_weight_parts(int64_t expert_dim) { return ceil_div(expert_dim, kTileCols); }

void multiply(const RowProduct& product, Stream stream) {
  switch (product.epilogue) {
    case Epilogue::kStore:
      return multiply_and_store(product, stream);
    case Epilogue::kActivate:
      return multiply_and_activate(product, stream);
    case Epilogue::kActivateBackward:
      return multiply_and_activate_backward(product, stream);
  }
}

void multiply(const WeightProduct& product, Stream stream) {
  const int64_t blocks = product.num_experts * ceil_div(product.out_rows, kTileRows) *
                         ceil_div(product.out_cols, kTileCols);
  const auto kernel = product.dtype == DType::kBFloat16 ? weight_product_kernel<BFloat16>
                                                        : weight_product_kernel<Float16>;
  launch({"sm80_weight_product", blocks, kThreads, sizeof(Shared)}, stream, kernel, product,
         gathered(product.left, product.out_rows), gathered(product.right, product.out_cols));
}

}  // namespace fomoe::cuda::sm80
