// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "grouped_gemm/sm90_row_product.cuh"

namespace fomoe::cuda::sm90 {
namespace {

/// The map of b, innermost dimension first, whichever it is.
TensorMap map_experts(const ExpertMatrices& b, int64_t num_experts) {
  // Of one expert the stride is never used: what a dense array would have is certain to be allowed.
  const int64_t one_expert = b.row_stride == 1 ? b.cols * b.col_stride : b.rows * b.row_stride;
  const int64_t expert_stride = num_experts > 1 ? b.expert_stride : one_expert;
  if (b.row_stride == 1) {
    return make_tensor_map(b.dtype, b.data,
                           {{b.rows, 1, kTileDepth},
                            {b.cols, b.col_stride, kBoxCols},
                            {num_experts, expert_stride, 1}});
  }
  return make_tensor_map(
      b.dtype, b.data,
      {{b.cols, 1, 64}, {b.rows, b.row_stride, kTileDepth}, {num_experts, expert_stride, 1}});
}

}  // namespace

RowArguments row_arguments(const RowProduct& product, const ColumnTiles& columns) {
  const ExpertMatrices& b = product.b;
  if (b.row_stride != 1 && b.col_stride != 1) {
    throw std::invalid_argument("fomoe: neither rows nor columns of the experts are contiguous");
  }
  RowArguments p = {};
  const bool is_shared = b.expert_stride == 0;
  p.steps = static_cast<int>(ceil_div(b.rows, kTileDepth));
  p.b = map_experts(b, is_shared ? 1 : b.num_experts);
  if (product.source.slots == nullptr) {
    p.a = make_tensor_map(b.dtype, product.source.data,
                          {{b.rows, 1, kTileDepth}, {product.source.count, b.rows, kTileRows}});
  }
  p.source = rows_of(product.source, b.rows);
  p.tiles = product.tiles;
  p.col_tiles = static_cast<int>(columns.count);
  p.cols_per_tile = static_cast<int>(columns.cols_per_tile);
  p.cols_per_box = static_cast<int>(columns.cols_per_box);
  p.expert_step = is_shared ? 0 : 1;
  p.bias = static_cast<const unsigned char*>(product.bias);
  p.cols = static_cast<int>(b.cols);
  return p;
}

void multiply(const RowProduct& product, Stream stream) {
  if (product.num_rows == 0 || product.b.num_experts == 0 || product.cols() == 0) return;
  if (product.depth() == 0) return simple::multiply(product, stream);  // nothing to load
  switch (product.epilogue) {
    case Epilogue::kStore:
      return store(product, stream);
    case Epilogue::kActivate:
      return activate(product, stream);
    case Epilogue::kActivateBackward:
      return activate_backward(product, stream);
  }
}

}  // namespace fomoe::cuda::sm90
