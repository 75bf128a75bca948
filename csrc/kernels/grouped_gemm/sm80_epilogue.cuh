// SPDX-License-Identifier: Apache-2.0
// What becomes of a tile's sums. They go through shared memory, so that a thread has 8 consecutive
// columns of a row, and of gate and up, and reads and writes global memory in 16 bytes.
#pragma once

#include "cuda/elements.cuh"
#include "expert_mlp/activated.h"
#include "grouped_gemm/sm80_copies.cuh"

namespace fomoe::cuda::sm80 {

/// Where quad `quad` of row `row` is: in different banks for the 8 rows and 4 pairs that half a
/// warp writes at once, and for the 8 chunks that a quarter reads.
FOMOE_DEVICE int quad_index(int row, int quad) {
  return row * (kTileCols / 4) + (quad ^ (row & 3) << 1 ^ (quad >> 3 & 1));
}

/// Between barriers.
FOMOE_DEVICE void store_sums(Shared& shared, const Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, pair = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row() + 16 * i + 8 * half + lane / 4;
        Quad& quad = shared.quads[quad_index(row, column_of(n) / 4 + pair / 2)];
        store_shared(reinterpret_cast<Pair*>(quad.sums + pair % 2 * 2),
                     Pair{sums[i][n][2 * half], sums[i][n][2 * half + 1]});
      }
    }
  }
}

/// Eight columns of a row.
struct Eight {
  float values[kChunkElements];
};

FOMOE_DEVICE Eight load_sums(const Shared& shared, int row, int chunk) {
  const Quad low = load_shared(&shared.quads[quad_index(row, 2 * chunk)]);
  const Quad high = load_shared(&shared.quads[quad_index(row, 2 * chunk + 1)]);
  return {{low.sums[0], low.sums[1], low.sums[2], low.sums[3], high.sums[0], high.sums[1],
           high.sums[2], high.sums[3]}};
}

/// Eight elements that move in one access.
template <typename T>
using EightOf = Elements<T, kChunkElements>;

template <typename T>
FOMOE_DEVICE Eight widened(const EightOf<T>& elements) {
  Eight result;
  widen(elements, result.values);
  return result;
}

template <typename T>
FOMOE_DEVICE EightOf<T> narrowed(const Eight& eight) {
  return narrow<T>(eight.values);
}

/// Those from `element` of an array on.
template <typename T>
FOMOE_DEVICE const EightOf<T>* eight_at(const void* array, int64_t element) {
  return reinterpret_cast<const EightOf<T>*>(static_cast<const T*>(array) + element);
}
template <typename T>
FOMOE_DEVICE EightOf<T>* eight_at(void* array, int64_t element) {
  return reinterpret_cast<EightOf<T>*>(static_cast<T*>(array) + element);
}

/// The bias at `element`, or zeros.
template <typename T>
FOMOE_DEVICE Eight bias_at(const void* bias, int64_t element) {
  return bias == nullptr ? Eight{} : widened<T>(load_global(eight_at<T>(bias, element)));
}

FOMOE_DEVICE Eight operator+(const Eight& a, const Eight& b) {
  Eight sum;
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) sum.values[i] = a.values[i] + b.values[i];
  return sum;
}

/// out: the matrix that the tile's first `rows` rows belong to, from its first row on. bias: of its
/// `cols` columns, or nullptr.
template <typename T>
FOMOE_DEVICE void store_rows(const Shared& shared, const Columns& columns, int rows, int64_t cols,
                             const void* bias, int64_t bias_first, void* out) {
  constexpr int kRowChunks = kTileCols / kChunkElements;
  const int chunk = static_cast<int>(threadIdx.x) % kRowChunks;
  const int64_t column = columns.of_chunk(chunk);
  if (column < 0) return;
  const Eight added = bias_at<T>(bias, bias_first + column);
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / kRowChunks; row < rows;
       row += kThreads / kRowChunks) {
    store_global(eight_at<T>(out, row * cols + column),
                 narrowed<T>(load_sums(shared, row, chunk) + added));
  }
}

/// kActivate, for the rows of a tile.
template <typename T, Activation activation>
FOMOE_DEVICE void activate_rows(const Shared& shared, const RowProduct& product,
                                const RowTile& tile, const Columns& columns) {
  constexpr bool gated = is_gated(activation);
  constexpr int kRowChunks = kTileCols / kChunkElements / (gated ? 2 : 1);
  const int64_t cols = product.b.cols, expert_dim = gated ? cols / 2 : cols;
  const int chunk = static_cast<int>(threadIdx.x) % kRowChunks;
  const int64_t column = columns.of_chunk(chunk);
  if (column < 0) return;
  const int64_t bias_first = tile.expert * cols + column;
  const Eight gate_bias = bias_at<T>(product.bias, bias_first);
  const Eight up_bias = gated ? bias_at<T>(product.bias, bias_first + expert_dim) : Eight{};
#pragma unroll 2
  for (int row = static_cast<int>(threadIdx.x) / kRowChunks; row < tile.end - tile.begin;
       row += kThreads / kRowChunks) {
    const int64_t r = tile.begin + row, at = r * cols + column;
    const EightOf<T> gate = narrowed<T>(load_sums(shared, row, chunk) + gate_bias);
    EightOf<T> up = gate;
    if constexpr (gated) up = narrowed<T>(load_sums(shared, row, kRowChunks + chunk) + up_bias);
    if (product.pre != nullptr) {
      store_global(eight_at<T>(product.pre, at), gate);
      if constexpr (gated) store_global(eight_at<T>(product.pre, at + expert_dim), up);
    }
    const Eight gates = widened<T>(gate), ups = widened<T>(up);
    Eight hidden;
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) {
      hidden.values[i] = activated<activation>(gates.values[i], ups.values[i]).value;
    }
    store_global(eight_at<T>(product.hidden, r * expert_dim + column), narrowed<T>(hidden));
  }
}

/// The combine weight of a row; 0 if its slot does not exist.
FOMOE_DEVICE float weight_of(const RowProduct& product, int64_t row) {
  const RowSource& source = product.source;
  const int64_t slot = source.slots == nullptr ? row : load_global(source.slots + row);
  const bool exists = 0 <= slot && slot < source.count * source.top_k;
  return exists ? load_global(static_cast<const float*>(product.weights) + slot) : 0.0f;
}

/// kActivateBackward, for 8 columns of a row. Returns the sum of d_hidden * act(pre).
template <typename T, Activation activation>
FOMOE_DEVICE float activate_backward(const RowProduct& product, int64_t row, int64_t column,
                                     const Eight& d_hidden) {
  constexpr bool gated = is_gated(activation);
  const int64_t expert_dim = product.b.cols;
  const int64_t at = row * (gated ? 2 * expert_dim : expert_dim) + column;
  const float weight = weight_of(product, row);
  const Eight gates = widened<T>(load_global_once(eight_at<T>(product.pre, at)));
  Eight ups = gates;
  if constexpr (gated)
    ups = widened<T>(load_global_once(eight_at<T>(product.pre, at + expert_dim)));
  Eight hidden, d_gate, d_up;
  float part = 0;
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    const auto act = activated<activation>(gates.values[i], ups.values[i]);
    const float d_act = weight * d_hidden.values[i];
    part += d_hidden.values[i] * act.value;
    hidden.values[i] = weight * act.value;
    d_gate.values[i] = d_act * act.d_gate;
    d_up.values[i] = d_act * act.d_up;
  }
  store_global(eight_at<T>(product.hidden, row * expert_dim + column), narrowed<T>(hidden));
  store_global(eight_at<T>(product.d_pre, at), narrowed<T>(d_gate));
  if constexpr (gated) store_global(eight_at<T>(product.d_pre, at + expert_dim), narrowed<T>(d_up));
  return part;
}

/// kActivateBackward, for the rows of a tile, which is number `part` of the parts of the columns.
template <typename T, Activation activation>
FOMOE_DEVICE void activate_backward_rows(const Shared& shared, const RowProduct& product,
                                         const RowTile& tile, const Columns& columns, int64_t part,
                                         int64_t num_parts) {
  constexpr int kRowChunks = kTileCols / kChunkElements;
  const int chunk = static_cast<int>(threadIdx.x) % kRowChunks;
  const int64_t column = columns.of_chunk(chunk);
  const Eight added =
      column < 0 ? Eight{} : bias_at<T>(product.bias, tile.expert * product.b.cols + column);
#pragma unroll 2
  for (int first = 0; first < kTileRows; first += kThreads / kRowChunks) {
    const int row = first + static_cast<int>(threadIdx.x) / kRowChunks;
    const bool exists = row < tile.end - tile.begin;
    float sum = 0;
    if (exists && column >= 0) {
      sum = activate_backward<T, activation>(product, tile.begin + row, column,
                                             load_sums(shared, row, chunk) + added);
    }
#pragma unroll
    for (int bits = kRowChunks / 2; bits > 0; bits /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, bits);
    }
    if (exists && chunk == 0) {
      store_global(
          static_cast<float*>(product.weight_parts) + (tile.begin + row) * num_parts + part, sum);
    }
  }
}

}  // namespace fomoe::cuda::sm80
