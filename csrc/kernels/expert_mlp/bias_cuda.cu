// SPDX-License-Identifier: Apache-2.0
// Sums over the rows of an expert in two steps, so that one expert with every row is no slower than
// many: sum_tile_rows adds up the rows of each tile, sum_tiles the tiles of each expert. In both,
// warp w of a block takes the w-th of every kWarps terms, and the warps' sums are added in order.
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/memory.cuh"
#include "expert_mlp/bias_cuda.h"
#include "fomoe/workspace.h"
#include "routing/row_of.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowsPerWarp = kTileRows / kWarps;
constexpr int kInFlight = 8;
static_assert(kRowsPerWarp <= kWarpSize && kRowsPerWarp % kInFlight == 0);

/// Columns of a block: `count` next to each other in each lane. Column i of the block, that is
/// element i % count of lane i / count, lies where neither lanes nor columns meet in a bank.
template <int count>
constexpr int kBlockColumns = kWarpSize * count;
template <int count>
FOMOE_DEVICE int position(int lane, int element) {
  return element * (kWarpSize + kWarpSize / count) + lane;
}

template <typename Real, int count>
struct SumsOfWarps {
  Real sums[kWarps][count * (kWarpSize + kWarpSize / count)];
};

/// A row of the source and its scale; negative for a row of zeros.
template <typename Real>
struct ScaledRow {
  int32_t index;
  Real scale;
};

template <typename Real>
FOMOE_DEVICE ScaledRow<Real> load_row(const RowSource& source, const Real* weights, int64_t row) {
  if (source.slots == nullptr) return {static_cast<int32_t>(row), Real(1)};
  const int32_t slot = load_global(source.slots + row);
  if (slot < 0 || slot >= source.count * source.top_k) return {-1, Real(0)};
  return {static_cast<int32_t>(slot / source.top_k),
          weights ? load_global(weights + slot) : Real(1)};
}

template <typename T, int count>
__global__ void __launch_bounds__(kThreads, 4)
    sum_tile_rows_kernel(RowSource source, const Accumulate<T>* weights, int64_t width,
                         int64_t column_blocks, RowTiles tiles, Accumulate<T>* tile_sums) {
  using Real = Accumulate<T>;
  auto& shared = dynamic_shared<SumsOfWarps<Real, count>>();
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t tile_index = blockIdx.x / column_blocks;
  if (tile_index >= load_global(tiles.count)) return;
  const RowTile tile = load_global(tiles.tiles + tile_index);
  const int64_t first_column = blockIdx.x % column_blocks * kBlockColumns<count>;
  const int64_t accesses = width / count, i = first_column / count + lane;
  const auto* data = static_cast<const Elements<T, count>*>(source.data);

  ScaledRow<Real> lane_row = {-1, Real(0)};
  const int64_t own_row = tile.begin + warp + int64_t{kWarps} * lane;
  if (lane < kRowsPerWarp && own_row < tile.end) lane_row = load_row(source, weights, own_row);
  Real sums[count] = {};
  for (int first = 0; first < kRowsPerWarp; first += kInFlight) {
    Elements<T, count> loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t row = __shfl_sync(kAllLanes, lane_row.index, first + k);
      loaded[k] = load_global_once_if(row >= 0 && i < accesses, data + row * accesses + i);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const Real scale = __shfl_sync(kAllLanes, lane_row.scale, first + k);
      Real values[count];
      widen(loaded[k], values);
#pragma unroll
      for (int c = 0; c < count; ++c) sums[c] += scale * values[c];
    }
  }
#pragma unroll
  for (int c = 0; c < count; ++c) {
    store_shared(&shared.sums[warp][position<count>(lane, c)], sums[c]);
  }
  __syncthreads();
  if (thread < kBlockColumns<count> && first_column + thread < width) {
    Real sum = 0;
    const int at = position<count>(thread / count, thread % count);
    for (int w = 0; w < kWarps; ++w) sum += load_shared(&shared.sums[w][at]);
    store_global(tile_sums + tile_index * width + first_column + thread, sum);
  }
}

/// The first tile of an expert that is not before `expert`.
FOMOE_DEVICE int64_t first_tile(const RowTile* tiles, int64_t count, int64_t expert) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_global(&tiles[middle].expert) < expert) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_tiles_kernel(const Accumulate<T>* tile_sums, int64_t width, int64_t column_blocks,
                     RowTiles tiles, T* out) {
  using Real = Accumulate<T>;
  auto& shared = dynamic_shared<SumsOfWarps<Real, 1>>();
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t expert = blockIdx.x / column_blocks;
  const int64_t column = blockIdx.x % column_blocks * kWarpSize + lane;
  const int64_t count = load_global(tiles.count);
  const int64_t begin = first_tile(tiles.tiles, count, expert);
  const int64_t end = first_tile(tiles.tiles, count, expert + 1);
  Real sum = 0;
  if (column < width) {
#pragma unroll 4
    for (int64_t tile = begin + warp; tile < end; tile += kWarps) {
      sum += load_global_once(tile_sums + tile * width + column);
    }
  }
  store_shared(&shared.sums[warp][lane], sum);
  __syncthreads();
  if (warp > 0 || column >= width) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += load_shared(&shared.sums[w][lane]);
  store_global(out + expert * width + column, from_accumulate<T>(sum));
}

template <typename Real>
__global__ void __launch_bounds__(kThreads)
    sum_weight_parts_kernel(const Real* parts, int64_t num_parts, Routing routing,
                            Real* d_weights) {
  const int64_t slot = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (slot >= routing.num_rows()) return;
  const int64_t row = row_of(routing, slot, routing.num_rows());
  Real sum = 0;
  for (int64_t i = 0; row >= 0 && i < num_parts; ++i) {
    sum += load_global(parts + row * num_parts + i);
  }
  store_global(d_weights + slot, sum);
}

/// The last expert whose rows do not begin after `row`.
FOMOE_DEVICE int64_t expert_of(const Routing& routing, int64_t row) {
  int64_t low = 0, high = routing.num_local_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (load_global(routing.offsets + middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// A warp per slot.
template <typename T, int count>
__global__ void __launch_bounds__(kThreads)
    add_bias_dots_kernel(const Elements<T, count>* grad_y, const Elements<T, count>* b2,
                         int64_t accesses, Routing routing, Accumulate<T>* d_weights) {
  using Real = Accumulate<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t slot = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (slot >= routing.num_rows()) return;
  const int64_t row = row_of(routing, slot, routing.num_rows());
  if (row < 0) return;
  const Elements<T, count>* grad = grad_y + slot / routing.top_k * accesses;
  const Elements<T, count>* bias = b2 + expert_of(routing, row) * accesses;
  Real sum = 0;
#pragma unroll 4
  for (int64_t i = lane; i < accesses; i += kWarpSize) {
    Real left[count], right[count];
    widen(load_global(grad + i), left);
    widen(load_global(bias + i), right);
#pragma unroll
    for (int c = 0; c < count; ++c) sum += left[c] * right[c];
  }
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  if (lane == 0) store_global(d_weights + slot, load_global_once(d_weights + slot) + sum);
}

}  // namespace

int64_t expert_sums_bytes(DType dtype, int64_t width, int64_t num_rows, int64_t num_experts) {
  Workspace workspace(nullptr);
  const int64_t real_bytes = dtype == DType::kFloat64 ? 8 : 4;
  workspace.take_bytes(most_row_tiles(num_rows, num_experts) * width * real_bytes);
  return workspace.bytes();
}

void sum_expert_rows(const ExpertSums& sums, void* workspace, Stream stream) {
  const int64_t width = sums.width;
  dispatch(sums.dtype, [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    auto* tile_sums = static_cast<Real*>(workspace);
    const int widest = widest_access(address_of(sums.source.data), width * size_of(sums.dtype));
    with_elements_per_access<T>(widest, [&](auto count) {
      const int64_t column_blocks = ceil_div(width, kBlockColumns<count>);
      launch({"sum_tile_rows", sums.tiles.most * column_blocks, kThreads,
              sizeof(SumsOfWarps<Real, count>)},
             stream, sum_tile_rows_kernel<T, count>, sums.source,
             static_cast<const Real*>(sums.weights), width, column_blocks, sums.tiles, tile_sums);
    });
    const int64_t column_blocks = ceil_div(width, kWarpSize);
    launch({"sum_tiles", sums.num_experts * column_blocks, kThreads, sizeof(SumsOfWarps<Real, 1>)},
           stream, sum_tiles_kernel<T>, tile_sums, width, column_blocks, sums.tiles,
           static_cast<T*>(sums.out));
  });
}

void finish_weight_gradient(const WeightGradient& gradient, Stream stream) {
  const Routing& routing = gradient.routing;
  const int64_t num_rows = routing.num_rows();
  dispatch(gradient.dtype, [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    auto* d_weights = static_cast<Real*>(gradient.d_weights);
    launch({"sum_weight_parts", ceil_div(num_rows, kThreads), kThreads}, stream,
           sum_weight_parts_kernel<Real>, static_cast<const Real*>(gradient.weight_parts),
           gradient.num_parts, routing, d_weights);
    if (gradient.b2 == nullptr) return;
    const int widest = widest_access(address_of(gradient.grad_y), address_of(gradient.b2),
                                     gradient.dim * size_of(gradient.dtype));
    with_elements_per_access<T>(widest, [&](auto count) {
      using Access = Elements<T, count>;
      launch({"add_bias_dots", ceil_div(num_rows, kWarps), kThreads}, stream,
             add_bias_dots_kernel<T, count>, static_cast<const Access*>(gradient.grad_y),
             static_cast<const Access*>(gradient.b2), gradient.dim / count, routing, d_weights);
    });
  });
}

}  // namespace fomoe::cuda
