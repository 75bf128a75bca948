// SPDX-License-Identifier: Apache-2.0
#include "grouped_gemm/sm90_row_product.cuh"

namespace fomoe::cuda::sm90 {
namespace {

template <typename T>
struct StoreEpilogue {
  static constexpr int kCols = 256;
  using Pipeline = sm90::Pipeline<kCols, 4>;
  using Shared = Staging;

  FOMOE_DEVICE explicit StoreEpilogue(Shared& shared) : chunks(shared) {}
  FOMOE_DEVICE void begin(const RowArguments&, const WarpTile&) {}
  FOMOE_DEVICE void end(const RowArguments& p, const WarpTile& tile, const float (&sums)[128]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ChunkWords words;
      pack_chunk<T>(sums + 32 * i, words);
      if (tile.rows > 0) {
        chunks.store(p.out, words, tile.row, tile.rows, 0, tile.first_col + i * kChunkCols);
      }
    }
  }
  FOMOE_DEVICE void finish() { chunks.finish(); }

  ChunkStore chunks;
};

}  // namespace

void store(const RowProduct& product, Stream stream) {
  const int64_t cols = product.cols();
  RowArguments p = row_arguments(product, {ceil_div(cols, 256), 256, kBoxCols});
  p.out = row_output(product.dtype(), product.out, product.num_rows, cols, 1);
  launch_row_product<StoreEpilogue>("sm90_row_store", product, p, stream);
}

}  // namespace fomoe::cuda::sm90
