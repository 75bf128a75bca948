// SPDX-License-Identifier: Apache-2.0
// What the Hopper products have in common. A block has a warpgroup that loads stages of 64 k of
// both operands into shared memory, ahead of two warpgroups that multiply them, 64 rows of the tile
// each. Blocks are persistent: tile t, t + grid, ...; while a tile is stored, the next is loaded.
#pragma once

#include <algorithm>

#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"
#include "grouped_gemm/products.h"

namespace fomoe::cuda::sm90 {

inline constexpr int kTileDepth = 64;
inline constexpr int kLineBytes = 128;  // 64 elements
inline constexpr int kSlabBytes = 64 * kLineBytes;
inline constexpr int kNumConsumers = 2;  // warpgroups
inline constexpr int kNumConsumerWarps = 4 * kNumConsumers;
inline constexpr int kLoaders = 128;  // threads, the first of the block
inline constexpr int kThreads = kLoaders * (1 + kNumConsumers);
inline constexpr int kMostSharedBytes = 227 * 1024;  // of a block on sm_90
// 128 * 40 + 256 * 232 of the 65536 registers.
inline constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;

/// A number that is the same in all lanes, so that the compiler knows it, too: what depends on it
/// stays in uniform registers, where wgmma wants its descriptors.
template <typename Integer>
FOMOE_DEVICE Integer uniform(Integer value) {
  return __shfl_sync(kAllLanes, value, 0);
}

FOMOE_DEVICE int own_warpgroup() { return uniform(static_cast<int>(threadIdx.x) / 128); }

/// Both operands of one step, in lines with 128-byte swizzle.
template <int cols>
struct alignas(1024) Stage {
  unsigned char a[kTileRows * kLineBytes];
  unsigned char b[cols * kLineBytes];
};

template <int tile_cols, int num_stages>
struct Pipeline {
  static constexpr int kCols = tile_cols, kNumStages = num_stages;
  static constexpr int kStageBytes = sizeof(Stage<tile_cols>);

  Stage<tile_cols> stages[num_stages];
  Mbarrier full[num_stages], empty[num_stages];
};

/// Where a warpgroup is in the ring of stages.
struct Turn {
  int stage = 0;
  int parity = 0;  // of the ring's round

  template <typename Pipeline>
  FOMOE_DEVICE void advance(const Pipeline&) {
    if (++stage < Pipeline::kNumStages) return;
    stage = 0;
    parity ^= 1;
  }
};

/// By the whole block. `arrivals`: how often the loaders arrive to fill a stage.
template <typename Pipeline>
FOMOE_DEVICE void prepare(Pipeline& pipeline, int arrivals) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Pipeline::kNumStages; ++i) {
      init(pipeline.full[i], arrivals);
      init(pipeline.empty[i], kNumConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
}

template <typename Pipeline>
FOMOE_DEVICE void wait_empty(Pipeline& pipeline, const Turn& turn) {
  wait(pipeline.empty[turn.stage], turn.parity ^ 1);
}
template <typename Pipeline>
FOMOE_DEVICE void wait_full(Pipeline& pipeline, const Turn& turn) {
  wait(pipeline.full[turn.stage], turn.parity);
}
template <typename Pipeline>
FOMOE_DEVICE void release(Pipeline& pipeline, int stage) {
  if (threadIdx.x % kWarpSize == 0) arrive(pipeline.empty[stage]);
}

/// A descriptor of what lies `pieces` times 16 bytes later; its upper half stays a constant.
FOMOE_DEVICE uint64_t advanced(uint64_t descriptor, int pieces) {
  return (descriptor & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(descriptor) + pieces);
}

/// sums = the product of `steps` stages, at least one. In those from number `first_copied` on, some
/// of the operands came by cp.async.
template <typename T, Major a_major, Major b_major, typename Pipeline, int registers>
FOMOE_DEVICE void multiply_stages(Pipeline& pipeline, Turn& turn, int consumer, int steps,
                                  int first_copied, float (&sums)[registers]) {
  constexpr int kStageStep = Pipeline::kStageBytes / 16;
  const uint64_t first_a = wgmma_descriptor<a_major>(
      wgmma_address(pipeline.stages[0].a) + consumer * kSlabBytes, kSlabBytes);
  const uint64_t first_b =
      wgmma_descriptor<b_major>(wgmma_address(pipeline.stages[0].b), kSlabBytes);
  int previous = 0;
#pragma unroll 1
  for (int k = 0; k < steps; ++k) {
    wait_full(pipeline, turn);
    if (k >= first_copied) fence_async_proxy();
    const int first = uniform(turn.stage) * kStageStep;
    wgmma_fence(sums);
#pragma unroll
    for (int i = 0; i < kTileDepth / 16; ++i) {
      wgmma<T, a_major, b_major>(sums, advanced(first_a, first + i * (kStepBytes<a_major> / 16)),
                                 advanced(first_b, first + i * (kStepBytes<b_major> / 16)),
                                 k > 0 || i > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the previous stage has been read
    if (k > 0) release(pipeline, previous);
    previous = turn.stage;
    turn.advance(pipeline);
  }
  wgmma_wait<0>();
  release(pipeline, previous);
}

/// Instead of multiply_stages, by a warpgroup without rows in the tile.
template <typename Pipeline>
FOMOE_DEVICE void skip_stages(Pipeline& pipeline, Turn& turn, int steps) {
#pragma unroll 1
  for (int k = 0; k < steps; ++k) {
    wait_full(pipeline, turn);
    release(pipeline, turn.stage);
    turn.advance(pipeline);
  }
}

/// Dense rows that the loaders read.
struct Rows {
  const unsigned char* data;
  const int32_t* slots;  // or nullptr
  uint32_t count, top_k;
  int width;

  /// Which row of `data` is row r of the product; -1 for a row of zeros.
  FOMOE_DEVICE int index(int64_t r) const {
    if (slots == nullptr) return static_cast<int>(r);
    const int slot = load_global(slots + r);
    const uint32_t row = static_cast<uint32_t>(slot) / top_k;
    return slot >= 0 && row < count ? static_cast<int>(row) : -1;
  }
  /// Copies 8 elements of a row, zeros for row -1 and past the width.
  FOMOE_DEVICE void copy_8(void* shared, int row, int col) const {
    const bool exists = row >= 0 && col < width;
    const int64_t offset = exists ? (int64_t{row} * width + col) * 2 : 0;
    cp_async_16(shared, data + offset, exists ? 16 : 0);
  }
};

/// Kernels count tiles in 32 bits.
inline void check_tiles(int64_t tiles) {
  if (tiles <= INT32_MAX) return;
  throw std::invalid_argument("fomoe: " + std::to_string(tiles) +
                              " tiles of a product are too many");
}

inline Rows rows_of(const RowSource& source, int64_t width) {
  return {static_cast<const unsigned char*>(source.data), source.slots,
          static_cast<uint32_t>(source.count), static_cast<uint32_t>(source.top_k),
          static_cast<int>(width)};
}

/// Swizzled place of a loader's 16 bytes among 16 lines: line threadIdx.x / 8, piece
/// threadIdx.x % 8. The same for the next 16 lines, 16 * kLineBytes further.
FOMOE_DEVICE int loader_offset() {
  const int line = threadIdx.x / 8, piece = threadIdx.x % 8;
  return line * kLineBytes + ((piece ^ line % 8) << 4);
}

}  // namespace fomoe::cuda::sm90
