// SPDX-License-Identifier: Apache-2.0
// RowProduct on tensor cores. As many blocks as fit the device at once take the tiles in turn, so
// that the grid depends on no device data. A block owns a tile and all of its depth.
#pragma once

#include <algorithm>

#include "grouped_gemm/sm80_epilogue.cuh"

namespace fomoe::cuda::sm80 {

inline constexpr int kBlocksPerMultiprocessor = 2;
/// Tiles of rows that are taken together for each tile of columns, so that both operands of the
/// blocks at work stay in the second level cache.
inline constexpr int64_t kBand = 16;

/// Gate and up of the same hidden columns have to meet.
FOMOE_HOST_DEVICE inline bool takes_both_halves(const RowProduct& product) {
  return product.epilogue == Epilogue::kActivate && is_gated(product.activation);
}
FOMOE_HOST_DEVICE inline int64_t num_col_tiles(const RowProduct& product) {
  return takes_both_halves(product) ? ceil_div(product.b.cols / 2, kTileCols / 2)
                                    : ceil_div(product.b.cols, kTileCols);
}

struct TilePosition {
  int64_t row_tile, col_tile;
};

FOMOE_DEVICE TilePosition position_of(int64_t i, int64_t row_tiles, int64_t col_tiles) {
  const int64_t band = i / (kBand * col_tiles), in_band = i - band * kBand * col_tiles;
  const int64_t left = row_tiles - band * kBand, rows = left < kBand ? left : kBand;
  return {band * kBand + in_band % rows, in_band / rows};
}

template <Lines lines>
FOMOE_DEVICE auto expert_columns(const ExpertMatrices& b, int32_t expert, const Columns& columns) {
  const void* data = static_cast<const char*>(b.data) + expert * b.expert_stride * kElementBytes;
  if constexpr (lines == Lines::kAlongDepth) {
    return ColumnsAlongDepth(data, b.rows, b.col_stride, columns);
  } else {
    return ColumnsAcross(data, b.rows, b.row_stride, columns.of_chunk(Layout<lines>::chunk()));
  }
}

/// Reads the tile's sums from shared memory.
template <typename T, Epilogue epilogue>
FOMOE_DEVICE void finish_rows(const Shared& shared, const RowProduct& product, const RowTile& tile,
                              const Columns& columns, const TilePosition& at, int64_t col_tiles) {
  if constexpr (epilogue == Epilogue::kStore) {
    const int64_t cols = product.b.cols;
    store_rows<T>(shared, columns, tile.end - tile.begin, cols, product.bias, tile.expert * cols,
                  eight_at<T>(product.out, tile.begin * cols));
  } else {
    const auto finish = [&]<Activation activation>() {
      if constexpr (epilogue == Epilogue::kActivate) {
        activate_rows<T, activation>(shared, product, tile, columns);
      } else {
        activate_backward_rows<T, activation>(shared, product, tile, columns, at.col_tile,
                                              col_tiles);
      }
    };
    switch (product.activation) {
      case Activation::kSwiglu:
        return finish.template operator()<Activation::kSwiglu>();
      case Activation::kSilu:
        return finish.template operator()<Activation::kSilu>();
      case Activation::kSwigluClamped:
        return finish.template operator()<Activation::kSwigluClamped>();
    }
  }
}

template <typename T, Epilogue epilogue, Lines lines>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    row_product_kernel(const __grid_constant__ RowProduct product) {
  auto& shared = dynamic_shared<Shared>();
  const int64_t row_tiles = load_global(product.tiles.count), col_tiles = num_col_tiles(product);
  const int64_t depth = product.b.rows;
  for (int64_t i = blockIdx.x; i < row_tiles * col_tiles; i += gridDim.x) {
    const TilePosition at = position_of(i, row_tiles, col_tiles);
    const RowTile tile = load_global(product.tiles.tiles + at.row_tile);
    const Columns columns = takes_both_halves(product)
                                ? columns_of_both_halves(at.col_tile, product.b.cols)
                                : consecutive_columns(at.col_tile, product.b.cols);
    auto right = expert_columns<lines>(product.b, tile.expert, columns);
    SourceRows left(product.source, depth, tile);
    Sums sums;
    multiply_tile<T, Lines::kAlongDepth, lines>(
        shared, static_cast<int>(ceil_div(depth, kTileDepth)), left, right, sums);
    __syncthreads();
    store_sums(shared, sums);
    __syncthreads();
    finish_rows<T, epilogue>(shared, product, tile, columns, at, col_tiles);
    __syncthreads();
  }
}

/// Epilogue by epilogue, so that they compile side by side.
void multiply_and_store(const RowProduct& product, Stream stream);
void multiply_and_activate(const RowProduct& product, Stream stream);
void multiply_and_activate_backward(const RowProduct& product, Stream stream);

template <typename T, Epilogue epilogue>
inline void launch_row_product(const char* name, const RowProduct& product, Stream stream) {
  const int64_t tiles = product.tiles.most * num_col_tiles(product);
  const int64_t blocks =
      std::min<int64_t>(tiles, int64_t{kBlocksPerMultiprocessor} * multiprocessor_count());
  const auto kernel = product.b.row_stride == 1
                          ? row_product_kernel<T, epilogue, Lines::kAlongDepth>
                          : row_product_kernel<T, epilogue, Lines::kAcross>;
  launch({name, blocks, kThreads, sizeof(Shared)}, stream, kernel, product);
}

template <Epilogue epilogue>
inline void launch_row_product(const char* name, const RowProduct& product, Stream stream) {
  if (product.dtype() == DType::kBFloat16) {
    launch_row_product<BFloat16, epilogue>(name, product, stream);
  } else {
    launch_row_product<Float16, epilogue>(name, product, stream);
  }
}

}  // namespace fomoe::cuda::sm80
