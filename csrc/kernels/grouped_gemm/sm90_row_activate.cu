// SPDX-License-Identifier: Apache-2.0
#include "expert_mlp/activated.h"
#include "grouped_gemm/sm90_row_product.cuh"

namespace fomoe::cuda::sm90 {
namespace {

/// hidden = act(gate, up), of the rounded words; up does not matter without a gate.
template <typename T, Activation activation>
FOMOE_DEVICE void activate_words(const ChunkWords& gate, const ChunkWords& up, ChunkWords& hidden) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const Pair g = unpack<T>(gate[i]), u = unpack<T>(up[i]);
    hidden[i] = pack<T>(activated<activation>(g.first, u.first).value,
                        activated<activation>(g.second, u.second).value);
  }
}

template <typename T>
FOMOE_DEVICE void activate_words(Activation activation, const ChunkWords& gate,
                                 const ChunkWords& up, ChunkWords& hidden) {
  switch (activation) {
    case Activation::kSwiglu:
      return activate_words<T, Activation::kSwiglu>(gate, up, hidden);
    case Activation::kSilu:
      return activate_words<T, Activation::kSilu>(gate, up, hidden);
    case Activation::kSwigluClamped:
      return activate_words<T, Activation::kSwigluClamped>(gate, up, hidden);
  }
}

/// The first two chunks of the sums are gate and the last two up, or all four are of one array.
template <typename T>
struct ActivateEpilogue {
  static constexpr int kCols = 256;
  using Pipeline = sm90::Pipeline<kCols, 4>;
  using Shared = Staging;

  FOMOE_DEVICE explicit ActivateEpilogue(Shared& shared) : chunks(shared) {}
  FOMOE_DEVICE void begin(const RowArguments&, const WarpTile&) {}
  FOMOE_DEVICE void end(const RowArguments& p, const WarpTile& tile, const float (&sums)[128]) {
    if (tile.rows <= 0) return;
    const bool gated = is_gated(p.activation);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int col = tile.first_col + i * kChunkCols;
      ChunkWords first, second;
      pack_chunk<T>(sums + 32 * i, first);
      pack_chunk<T>(sums + 32 * (i + 2), second);
      if (p.wants_pre) {
        chunks.store(p.pre, first, tile.row, tile.rows, 0, col);
        chunks.store(p.pre, second, tile.row, tile.rows, gated ? 1 : 0,
                     gated ? col : col + kBoxCols);
      }
      activate_words<T>(p.activation, first, second, first);
      chunks.store(p.out, first, tile.row, tile.rows, 0, col);
      if (gated) continue;
      activate_words<T>(p.activation, second, second, second);
      chunks.store(p.out, second, tile.row, tile.rows, 0, col + kBoxCols);
    }
  }
  FOMOE_DEVICE void finish() { chunks.finish(); }

  ChunkStore chunks;
};

}  // namespace

void activate(const RowProduct& product, Stream stream) {
  const bool gated = is_gated(product.activation);
  const int64_t cols = product.cols(), expert_dim = gated ? cols / 2 : cols;
  const ColumnTiles columns = gated ? ColumnTiles{ceil_div(expert_dim, 128), 128, expert_dim}
                                    : ColumnTiles{ceil_div(expert_dim, 256), 256, kBoxCols};
  RowArguments p = row_arguments(product, columns);
  p.out = row_output(product.dtype(), product.hidden, product.num_rows, expert_dim, 1);
  p.activation = product.activation;
  p.wants_pre = product.pre != nullptr;
  if (p.wants_pre) {
    p.pre = row_output(product.dtype(), product.pre, product.num_rows, expert_dim, gated ? 2 : 1);
  }
  launch_row_product<ActivateEpilogue>("sm90_row_activate", product, p, stream);
}

}  // namespace fomoe::cuda::sm90
