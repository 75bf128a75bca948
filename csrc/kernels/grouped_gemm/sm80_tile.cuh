// SPDX-License-Identifier: Apache-2.0
// One 128 x 128 tile of a product of 2-byte elements, by a block of 4 warps: left [128, depth]
// times right [depth, 128]. A stage is 32 steps of depth of both operands in shared memory, filled
// by cp.async while the tensor cores work on the stage before; a warp owns 64 rows and twice 32
// columns, c and 64 + c, so that two blocks of 64 columns (gate and up) can be apart in memory.
//
// Shared memory is read and written 16 bytes, a chunk, at a time. Chunks of a line are permuted by
// the line's number, so that the eight rows of an ldmatrix lie in different banks.
#pragma once

#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "grouped_gemm/products.h"

namespace fomoe::cuda::sm80 {

inline constexpr int kTileCols = 128;
inline constexpr int kTileDepth = 32;
inline constexpr int kStages = 4;  // a power of 2
inline constexpr int kThreads = 128;
inline constexpr int kChunkElements = 8;
inline constexpr int kStageChunks = kTileRows * kTileDepth / kChunkElements;  // of one operand
inline constexpr int kCopies = kStageChunks / kThreads;  // of a thread, operand and stage
static_assert(kTileRows == kTileCols);

/// Eight elements.
struct alignas(16) Chunk {
  uint32_t words[4];
};

/// Four sums.
struct alignas(16) Quad {
  float sums[4];
};

/// The stages, and after the last of them the sums of the tile.
union Shared {
  struct {
    Chunk left[kStages][kStageChunks], right[kStages][kStageChunks];
  };
  Quad quads[kTileRows * kTileCols / 4];
};

/// What lies next to each other in an operand's memory.
enum class Lines {
  kAlongDepth,  // 128 lines, one per row (or column) of the tile, of 4 chunks
  kAcross,      // 32 lines, one per step of depth, of 16 chunks
};

template <Lines lines>
struct Layout {
  static constexpr int kLineChunks = lines == Lines::kAlongDepth ? 4 : 16;

  static FOMOE_DEVICE int index(int line, int chunk) {
    const int mask = lines == Lines::kAlongDepth ? line >> 1 & 3 : line & 7;
    return line * kLineChunks + (chunk ^ mask);
  }
  /// The line and the chunk that this thread copies first; then every kLinesApart-th line.
  static constexpr int kLinesApart = kThreads / kLineChunks;
  static FOMOE_DEVICE int line() { return static_cast<int>(threadIdx.x) / kLineChunks; }
  static FOMOE_DEVICE int chunk() { return static_cast<int>(threadIdx.x) % kLineChunks; }
  /// Where copy i goes: kLinesApart is a multiple of 8, so that the permutation stays the same.
  static FOMOE_DEVICE int copy_index(int i) { return index(line(), chunk()) + i * kThreads; }
};

/// 16 steps of depth of a warp's 64 rows and 64 columns, as mma.sync wants them.
struct Fragments {
  uint32_t left[4][4], right[4][4];
};

/// sums[i][n][2 h + {0, 1}] of a thread: row warp_row() + 16 i + 8 h + lane / 4 of the tile,
/// columns column_of(n) + 2 (lane % 4) + {0, 1}.
using Sums = float[4][8][4];

FOMOE_DEVICE int warp_row() { return static_cast<int>(threadIdx.x) / 64 * 64; }
/// First of the 8 columns of the tile that sums[..][n] belong to.
FOMOE_DEVICE int column_of(int n) {
  return n / 4 * 64 + static_cast<int>(threadIdx.x) / 32 % 2 * 32 + n % 4 * 8;
}

/// Where a lane's rows of the left fragments lie in a stage, but for constants: the permutation
/// depends on the depth (lines along it), or on the fragment.
template <Lines lines>
class LeftPlaces {
 public:
  FOMOE_DEVICE LeftPlaces() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    if constexpr (lines == Lines::kAlongDepth) {
      first_ = Layout<lines>::index(warp_row() + lane % 16, lane / 16);
    } else {
      first_ = Layout<lines>::index(lane % 8 + lane / 16 * 8, warp_row() / 8 + lane / 8 % 2);
    }
  }

  /// Of steps [16 k, 16 (k + 1)) of depth.
  FOMOE_DEVICE void load(const Chunk* stage, int k, uint32_t (&fragments)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (lines == Lines::kAlongDepth) {
        load_matrices<false>(fragments[i], stage + (first_ ^ 2 * k) + i * 16 * 4);
      } else {
        load_matrices<true>(fragments[i], stage + (first_ ^ 2 * i) + k * 16 * 16);
      }
    }
  }

 private:
  int first_;  // of k = 0, i = 0
};

/// The same for the right fragments, two blocks of 8 columns each.
template <Lines lines>
class RightPlaces {
 public:
  FOMOE_DEVICE RightPlaces() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, column = column_of(0);
    if constexpr (lines == Lines::kAlongDepth) {
      first_ = Layout<lines>::index(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    } else {
      first_ = Layout<lines>::index(lane % 16, column / 8 + lane / 16);
    }
  }

  FOMOE_DEVICE void load(const Chunk* stage, int k, uint32_t (&fragments)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (lines == Lines::kAlongDepth) {
        load_matrices<false>(fragments[i],
                             stage + (first_ ^ 2 * k) + (i / 2 * 64 + i % 2 * 16) * 4);
      } else {
        load_matrices<true>(fragments[i], stage + (first_ ^ i % 2 * 2) + i / 2 * 8 + k * 16 * 16);
      }
    }
  }

 private:
  int first_;
};

template <typename T>
FOMOE_DEVICE void multiply_add(const Fragments& fragments, Sums& sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t (&right)[4] = fragments.right[n / 2];
      cuda::multiply_add<T>(sums[i][n], fragments.left[i], right[n % 2 * 2], right[n % 2 * 2 + 1]);
    }
  }
}

/// sums = left right over `steps` stages. left.copy(stage) and right.copy(stage) start the copies
/// of the next 32 steps of depth; they are called for 0, 1, ..., steps - 1. Nobody may use the
/// stages before a barrier that follows.
template <typename T, Lines left_lines, Lines right_lines, typename Left, typename Right>
FOMOE_DEVICE void multiply_tile(Shared& shared, int steps, Left& left, Right& right, Sums& sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < 8; ++n) sums[i][n][0] = sums[i][n][1] = sums[i][n][2] = sums[i][n][3] = 0;
  }
  if (steps == 0) return;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) {
      left.copy(shared.left[step]);
      right.copy(shared.right[step]);
    }
    cp_async_commit();
  }
  cp_async_wait<kStages - 2>();
  __syncthreads();
  const LeftPlaces<left_lines> left_places;
  const RightPlaces<right_lines> right_places;
  Fragments fragments[2];
  left_places.load(shared.left[0], 0, fragments[0].left);
  right_places.load(shared.right[0], 0, fragments[0].right);
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    left_places.load(shared.left[stage], 1, fragments[1].left);
    right_places.load(shared.right[stage], 1, fragments[1].right);
    if (step + kStages - 1 < steps) {  // into the stage that everybody left at the last barrier
      const int free = (stage + kStages - 1) % kStages;
      left.copy(shared.left[free]);
      right.copy(shared.right[free]);
    }
    cp_async_commit();
    multiply_add<T>(fragments[0], sums);
    cp_async_wait<kStages - 2>();
    __syncthreads();
    // Past the last step this reads a stage whose contents do not matter.
    stage = (stage + 1) % kStages;
    left_places.load(shared.left[stage], 0, fragments[0].left);
    right_places.load(shared.right[stage], 0, fragments[0].right);
    multiply_add<T>(fragments[1], sums);
  }
}

}  // namespace fomoe::cuda::sm80
