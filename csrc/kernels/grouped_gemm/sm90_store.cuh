// SPDX-License-Identifier: Apache-2.0
// How accumulators get to global memory: every warp puts its 16 rows, 64 columns at a time, into
// one of two buffers of its own, from where TMA stores them, or, at the end of an expert's rows,
// the lanes do.
#pragma once

#include "cuda/numeric.cuh"
#include "grouped_gemm/sm90_pipeline.cuh"

namespace fomoe::cuda::sm90 {

inline constexpr int kChunkRows = 16, kChunkCols = 64;

/// 16 x 64 elements, in lines with 128-byte swizzle.
struct alignas(1024) Chunk {
  unsigned char lines[kChunkRows * kLineBytes];
};

struct Staging {
  Chunk chunks[kNumConsumerWarps][2];
};

/// A lane's part of a chunk: words[2 j + i] are columns 8 j + lane % 4 * 2 + {0, 1} of row
/// lane / 4 + 8 i, as in accumulators.
using ChunkWords = uint32_t[16];

/// Place of words[2 j + i] in a chunk. Conflict-free: the 8 rows of a warp's access lie in 8
/// pieces.
FOMOE_DEVICE int word_offset(int j, int i) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4;
  return (row + 8 * i) * kLineBytes + ((j ^ row) << 4) + lane % 4 * 4;
}

template <typename T>
FOMOE_DEVICE void pack_chunk(const float* sums, ChunkWords& words) {
#pragma unroll
  for (int i = 0; i < 16; ++i) words[i] = pack<T>(sums[2 * i], sums[2 * i + 1]);
}

/// An array of rows of `parts` parts of `width` columns, with the map of it that TMA stores by.
struct RowOutput {
  TensorMap map;  // columns of a part, part, row
  unsigned char* data;
  int width, parts;
};

inline RowOutput row_output(DType dtype, void* data, int64_t num_rows, int64_t width,
                            int64_t parts) {
  return {make_tensor_map(
              dtype, data,
              {{width, 1, kChunkCols}, {parts, width, 1}, {num_rows, parts * width, kChunkRows}}),
          static_cast<unsigned char*>(data), static_cast<int>(width), static_cast<int>(parts)};
}

/// A warp's two buffers.
class ChunkStore {
 public:
  FOMOE_DEVICE explicit ChunkStore(Staging& staging)
      : chunks_(staging.chunks[threadIdx.x / kWarpSize - kLoaders / kWarpSize]) {}

  /// Columns col.. of a part, to rows row.. of which `rows` exist.
  FOMOE_DEVICE void store(const RowOutput& output, const ChunkWords& words, int row, int rows,
                          int part, int col) {
    if (col >= output.width) return;
    Chunk& chunk = write(words);
    if (rows >= kChunkRows) {
      store_box(output.map, chunk, col, part, row);
    } else {
      store_rows(output, chunk, row, rows, part, col);
    }
  }
  /// A whole chunk; what lies outside of the map's array is dropped.
  FOMOE_DEVICE void store(const TensorMap& map, const ChunkWords& words, int x, int y, int z) {
    store_box(map, write(words), x, y, z);
  }
  /// Before the thread exits.
  FOMOE_DEVICE void finish() { tma_wait_read<0>(); }

 private:
  FOMOE_DEVICE Chunk& write(const ChunkWords& words) {
    Chunk& chunk = chunks_[turn_ ^= 1];
    tma_wait_read<1>();  // the store before the last has read this buffer
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_shared(reinterpret_cast<uint32_t*>(chunk.lines + word_offset(j, i)),
                     words[2 * j + i]);
      }
    }
    return chunk;
  }
  FOMOE_DEVICE void store_box(const TensorMap& map, const Chunk& chunk, int x, int y, int z) {
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      tma_store(map, chunk.lines, x, y, z);
      tma_commit();
    }
  }
  FOMOE_DEVICE void store_rows(const RowOutput& output, const Chunk& chunk, int row, int rows,
                               int part, int col) {
    __syncwarp();
    const int lane = threadIdx.x % kWarpSize, piece = lane % 8;
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int line = lane / 8 + 4 * pass;
      if (line >= rows || col + 8 * piece >= output.width) continue;
      const int offset = line * kLineBytes + ((piece ^ line % 8) << 4);
      const int64_t element =
          (int64_t{row + line} * output.parts + part) * output.width + col + 8 * piece;
      store_global(reinterpret_cast<Packet<16>*>(output.data + 2 * element),
                   load_shared(reinterpret_cast<const Packet<16>*>(chunk.lines + offset)));
    }
    tma_commit();  // an empty group, so that the buffers go on taking turns
  }

  Chunk* chunks_;
  int turn_ = 0;
};

}  // namespace fomoe::cuda::sm90
