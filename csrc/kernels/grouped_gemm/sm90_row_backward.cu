// SPDX-License-Identifier: Apache-2.0
#include "expert_mlp/activated.h"
#include "grouped_gemm/sm90_row_product.cuh"

namespace fomoe::cuda::sm90 {
namespace {

constexpr int kTileCols = 128, kTileChunks = kTileCols / kChunkCols;

/// The saved pre-activation of a warp's rows: gate, and up if there is one. The gradients take
/// their places, from where they are stored.
struct SavedPre {
  Chunk parts[2][kTileChunks];
};

/// What becomes of one pair of columns.
struct PairGradient {
  float part;  // of the sum of d_hidden * act(pre)
  uint32_t hidden, d_gate, d_up;
};

template <typename T, Activation activation>
FOMOE_DEVICE PairGradient gradient_of(const float* d_hidden, float weight, uint32_t gate_word,
                                      uint32_t up_word) {
  const Pair gate = unpack<T>(gate_word), up = unpack<T>(up_word);
  const auto first = activated<activation>(gate.first, up.first);
  const auto second = activated<activation>(gate.second, up.second);
  const float d_first = weight * d_hidden[0], d_second = weight * d_hidden[1];
  return {d_hidden[0] * first.value + d_hidden[1] * second.value,
          pack<T>(weight * first.value, weight * second.value),
          pack<T>(d_first * first.d_gate, d_second * second.d_gate),
          pack<T>(d_first * first.d_up, d_second * second.d_up)};
}

template <typename T>
struct BackwardEpilogue {
  static constexpr int kCols = kTileCols;
  using Pipeline = sm90::Pipeline<kCols, 4>;
  struct Shared {
    Staging staging;
    SavedPre saved[kNumConsumerWarps];
  };

  FOMOE_DEVICE explicit BackwardEpilogue(Shared& shared)
      : chunks(shared.staging),
        saved(shared.saved[threadIdx.x / kWarpSize - kLoaders / kWarpSize]) {}

  /// Copies the pre-activation, while the product is computed.
  FOMOE_DEVICE void begin(const RowArguments& p, const WarpTile& tile) {
    const int lane = volatile_lane(), piece = lane % 8;
    chunks.finish();
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int line = lane / 8 + 4 * pass;
      const int offset = line * kLineBytes + ((piece ^ line % 8) << 4);
#pragma unroll
      for (int i = 0; i < kTileChunks; ++i) {
        const int col = tile.first_col + i * kChunkCols + 8 * piece;
        const bool exists = line < tile.rows && col < p.out.width;
        for (int part = 0; part < p.pre.parts; ++part) {
          const int64_t element =
              (int64_t{tile.row + line} * p.pre.parts + part) * p.out.width + col;
          cp_async_16(saved.parts[part][i].lines + offset, p.saved_pre + (exists ? 2 * element : 0),
                      exists ? 16 : 0);
        }
      }
    }
    cp_async_commit();
  }

  FOMOE_DEVICE void end(const RowArguments& p, const WarpTile& tile, const float (&sums)[64]) {
    cp_async_wait<0>();
    __syncwarp();
    if (tile.rows <= 0) return;
    switch (p.activation) {
      case Activation::kSwiglu:
        return end<Activation::kSwiglu>(p, tile, sums);
      case Activation::kSilu:
        return end<Activation::kSilu>(p, tile, sums);
      case Activation::kSwigluClamped:
        return end<Activation::kSwigluClamped>(p, tile, sums);
    }
  }

  template <Activation activation>
  FOMOE_DEVICE void end(const RowArguments& p, const WarpTile& tile, const float (&sums)[64]) {
    constexpr bool gated = is_gated(activation);
    const int lane = volatile_lane();
    const float weights[2] = {weight_of(p, tile, lane / 4), weight_of(p, tile, lane / 4 + 8)};
    float parts[2] = {};
#pragma unroll
    for (int i = 0; i < kTileChunks; ++i) {
      const int col = tile.first_col + i * kChunkCols;
      if (col >= p.out.width) break;
      Chunk& hidden = chunks.next();
      Chunk &gate = saved.parts[0][i], &up = saved.parts[1][i];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int offset = word_offset(lane, j / 2, j % 2);
        uint32_t* gate_word = reinterpret_cast<uint32_t*>(gate.lines + offset);
        uint32_t* up_word = reinterpret_cast<uint32_t*>(up.lines + offset);
        const uint32_t gate_value = load_shared(gate_word);
        const PairGradient gradient =
            gradient_of<T, activation>(sums + 32 * i + 2 * j, weights[j % 2], gate_value,
                                       gated ? load_shared(up_word) : gate_value);
        parts[j % 2] += gradient.part;
        store_shared(reinterpret_cast<uint32_t*>(hidden.lines + offset), gradient.hidden);
        store_shared(gate_word, gradient.d_gate);
        if (gated) store_shared(up_word, gradient.d_up);
      }
      chunks.publish();
      chunks.put(p.out, hidden, tile.row, tile.rows, 0, col);
      chunks.put(p.pre, gate, tile.row, tile.rows, 0, col);
      if (gated) chunks.put(p.pre, up, tile.row, tile.rows, 1, col);
      chunks.close();
    }
    store_parts(p, tile, parts);
  }

  FOMOE_DEVICE void finish() { chunks.finish(); }

 private:
  /// The combine weight of a row; 0 if its slot, or the row, does not exist.
  FOMOE_DEVICE static float weight_of(const RowArguments& p, const WarpTile& tile, int line) {
    if (line >= tile.rows) return 0;
    const int64_t row = tile.row + line;
    const int64_t slot = p.source.slots == nullptr ? row : load_global(p.source.slots + row);
    const bool exists = 0 <= slot && slot < int64_t{p.source.count} * p.source.top_k;
    return exists ? load_global(p.weights + slot) : 0.0f;
  }

  /// The four lanes of a row add up in a fixed order.
  FOMOE_DEVICE static void store_parts(const RowArguments& p, const WarpTile& tile,
                                       const float (&parts)[2]) {
    const int lane = volatile_lane();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = parts[i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int line = lane / 4 + 8 * i;
      if (lane % 4 != 0 || line >= tile.rows) continue;
      store_global(p.weight_parts + int64_t{tile.row + line} * p.col_tiles + tile.col_tile, sum);
    }
  }

  ChunkStore chunks;
  SavedPre& saved;
};

}  // namespace

int64_t num_weight_parts(int64_t expert_dim) { return ceil_div(expert_dim, kTileCols); }

void activate_backward(const RowProduct& product, Stream stream) {
  const int64_t expert_dim = product.cols(), parts = is_gated(product.activation) ? 2 : 1;
  RowArguments p = row_arguments(product, {num_weight_parts(expert_dim), kTileCols, kTileCols});
  p.out = row_output(product.dtype(), product.hidden, product.num_rows, expert_dim, 1);
  p.pre = row_output(product.dtype(), product.d_pre, product.num_rows, expert_dim, parts);
  p.activation = product.activation;
  p.saved_pre = static_cast<const unsigned char*>(product.pre);
  p.weights = static_cast<const float*>(product.weights);
  p.weight_parts = static_cast<float*>(product.weight_parts);
  launch_row_product<BackwardEpilogue>("sm90_row_backward", product, p, stream);
}

}  // namespace fomoe::cuda::sm90
