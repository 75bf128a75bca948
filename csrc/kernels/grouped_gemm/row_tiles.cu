// SPDX-License-Identifier: Apache-2.0
// list_row_tiles is one block: it takes the experts in chunks of one per thread, scans their
// numbers of tiles, and then shares the tiles of the chunk out to all threads, so that one expert
// with every row is no slower than many. zero_rows_past_end is a plain loop over the tail.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "fomoe/workspace.h"
#include "grouped_gemm/expert_rows.cuh"
#include "grouped_gemm/products.h"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

struct ChunkOfExperts {
  int32_t begin[kThreads], end[kThreads];  // rows
  int64_t last_tile[kThreads];             // inclusive scan of the numbers of tiles
  int64_t warp_tiles[kWarps];
};

/// Inclusive sum over the threads of the block.
FOMOE_DEVICE int64_t block_scan(int64_t value, int64_t* warp_sums) {
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  if (lane == kWarpSize - 1) store_shared(warp_sums + warp, value);
  __syncthreads();
  for (int i = 0; i < warp; ++i) value += load_shared(warp_sums + i);
  return value;
}

/// How many of the chunk's scanned counts are at most `tile`: the index of the expert it is of.
FOMOE_DEVICE int expert_of_tile(const int64_t* last_tile, int64_t tile) {
  int low = 0;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (load_shared(last_tile + low + step - 1) <= tile) low += step;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    list_row_tiles_kernel(const int32_t* offsets, int64_t num_experts, int64_t num_rows,
                          int64_t most, RowTile* tiles, int32_t* count) {
  auto& chunk = dynamic_shared<ChunkOfExperts>();
  const int thread = threadIdx.x;
  int64_t listed = 0;
  for (int64_t first = 0; first < num_experts; first += kThreads) {
    ExpertRows rows = {};
    if (first + thread < num_experts) rows = rows_of(offsets, first + thread, num_rows);
    const int64_t own_tiles = ceil_div(rows.end - rows.begin, kTileRows);
    store_shared(chunk.begin + thread, static_cast<int32_t>(rows.begin));
    store_shared(chunk.end + thread, static_cast<int32_t>(rows.end));
    store_shared(chunk.last_tile + thread, block_scan(own_tiles, chunk.warp_tiles));
    __syncthreads();
    const int64_t chunk_tiles = load_shared(chunk.last_tile + kThreads - 1);
    for (int64_t tile = thread; tile < chunk_tiles && listed + tile < most; tile += kThreads) {
      const int expert = expert_of_tile(chunk.last_tile, tile);
      const int64_t before = expert > 0 ? load_shared(chunk.last_tile + expert - 1) : 0;
      const auto skipped = static_cast<int32_t>((tile - before) * kTileRows);
      const int32_t begin = load_shared(chunk.begin + expert) + skipped;
      const int32_t end = load_shared(chunk.end + expert);
      store_global(tiles + listed + tile,
                   RowTile{static_cast<int32_t>(first) + expert, begin,
                           end - begin < kTileRows ? end : begin + kTileRows, 0});
    }
    listed += chunk_tiles;
    __syncthreads();
  }
  if (thread == 0) store_global(count, static_cast<int32_t>(listed < most ? listed : most));
}

template <int bytes>
__global__ void __launch_bounds__(256)
    zero_rows_past_end_kernel(const int32_t* offsets, int64_t num_experts, int64_t num_rows,
                              int64_t packets, Packet<bytes>* rows) {
  const int64_t end = executed_rows(offsets, num_experts, num_rows);
  const int64_t first = end * packets + blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < num_rows * packets; i += step) {
    store_global(rows + i, Packet<bytes>{});
  }
}

template <int bytes>
void launch_zero(const int32_t* offsets, int64_t num_experts, int64_t num_rows, int64_t row_bytes,
                 void* rows, Stream stream) {
  const int64_t packets = row_bytes / bytes;
  const int64_t blocks =
      std::min<int64_t>(ceil_div(num_rows * packets, 1024), int64_t{4} * multiprocessor_count());
  launch({"zero_rows_past_end", blocks, 256}, stream, zero_rows_past_end_kernel<bytes>, offsets,
         num_experts, num_rows, packets, static_cast<Packet<bytes>*>(rows));
}

struct Layout {
  Layout(int64_t num_rows, int64_t num_experts, void* memory) : workspace(memory) {
    most = most_row_tiles(num_rows, num_experts);
    tiles = workspace.take<RowTile>(most);
    count = workspace.take<int32_t>(1);
  }

  Workspace workspace;
  int64_t most;
  RowTile* tiles;
  int32_t* count;
};

}  // namespace

int64_t row_tiles_bytes(int64_t num_rows, int64_t num_experts) {
  return Layout(num_rows, num_experts, nullptr).workspace.bytes();
}

RowTiles list_row_tiles(const int32_t* offsets, int64_t num_experts, int64_t num_rows,
                        void* workspace, Stream stream) {
  const Layout layout(num_rows, num_experts, workspace);
  launch({"list_row_tiles", 1, kThreads, sizeof(ChunkOfExperts)}, stream, list_row_tiles_kernel,
         offsets, num_experts, num_rows, layout.most, layout.tiles, layout.count);
  return {layout.tiles, layout.count, layout.most};
}

void zero_rows_past_end(const int32_t* offsets, int64_t num_experts, int64_t num_rows,
                        int64_t row_bytes, void* rows, Stream stream) {
  if (num_rows * row_bytes == 0) return;
  switch (widest_access(address_of(rows), row_bytes)) {
    case 16:
      return launch_zero<16>(offsets, num_experts, num_rows, row_bytes, rows, stream);
    case 8:
      return launch_zero<8>(offsets, num_experts, num_rows, row_bytes, rows, stream);
    case 4:
      return launch_zero<4>(offsets, num_experts, num_rows, row_bytes, rows, stream);
    default:
      return launch_zero<2>(offsets, num_experts, num_rows, row_bytes, rows, stream);
  }
}

}  // namespace fomoe::cuda
