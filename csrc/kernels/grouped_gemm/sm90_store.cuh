// SPDX-License-Identifier: Apache-2.0
// How accumulators get to global memory: every warp puts its 16 rows, 64 columns at a time, into
// one of two buffers of its own, from where TMA stores them, or, at the end of an expert's rows,
// the lanes do.
#pragma once

#include "cuda/mma.cuh"
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
FOMOE_DEVICE int word_offset(int lane, int j, int i) {
  const int row = lane / 4;
  const int of_row = row * kLineBytes + (row << 4) + lane % 4 * 4;
  return (of_row ^ j << 4) + 8 * i * kLineBytes;
}

/// Place of the 16 bytes that a lane stores of words 4 quad .. 4 quad + 3 of the warp's lanes, as
/// stmatrix puts them together: of columns 8 j .. 8 j + 7, j = 2 quad + lane / 16.
FOMOE_DEVICE int piece_offset(int lane, int quad) {
  const int row = lane % 16;
  const int of_row = row * kLineBytes + (row % 8 << 4);
  return of_row ^ (2 * quad + lane / 16) << 4;
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

/// How a warp stores its chunks. Its two buffers take turns.
class ChunkStore {
 public:
  FOMOE_DEVICE explicit ChunkStore(Staging& staging)
      : chunks_(staging.chunks[threadIdx.x / kWarpSize - kLoaders / kWarpSize]) {}

  /// A buffer that all stores but those of the last group have read.
  FOMOE_DEVICE Chunk& next() {
    tma_wait_read<1>();
    __syncwarp();
    return chunks_[turn_ ^= 1];
  }
  /// Before the put of what the warp has written.
  FOMOE_DEVICE void publish() {
    fence_async_proxy();
    __syncwarp();
  }
  /// Stores columns col.. of a part to rows row.. of which `rows` exist.
  FOMOE_DEVICE void put(const RowOutput& output, const Chunk& chunk, int row, int rows, int part,
                        int col) {
    if (rows >= kChunkRows) {
      put(output.map, chunk, col, part, row);
    } else {
      put_rows(output, chunk, row, rows, part, col);
    }
  }
  /// Stores a whole chunk; what lies outside of the map's array is dropped.
  FOMOE_DEVICE void put(const TensorMap& map, const Chunk& chunk, int x, int y, int z) {
    if (threadIdx.x % kWarpSize == 0) tma_store(map, chunk.lines, x, y, z);
  }
  /// Ends a group of puts.
  FOMOE_DEVICE void close() { tma_commit(); }

  FOMOE_DEVICE void store(const RowOutput& output, const ChunkWords& words, int row, int rows,
                          int part, int col) {
    if (col >= output.width) return;
    const Chunk& chunk = write(words);
    put(output, chunk, row, rows, part, col);
    close();
  }
  FOMOE_DEVICE void store(const TensorMap& map, const ChunkWords& words, int x, int y, int z) {
    const Chunk& chunk = write(words);
    put(map, chunk, x, y, z);
    close();
  }
  /// Until all stores have read their buffers; before the thread exits.
  FOMOE_DEVICE void finish() { tma_wait_read<0>(); }

 private:
  FOMOE_DEVICE Chunk& write(const ChunkWords& words) {
    Chunk& chunk = next();
    const int lane = volatile_lane();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_matrices(chunk.lines + piece_offset(lane, i),
                     {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]});
    }
    publish();
    return chunk;
  }
  FOMOE_DEVICE void put_rows(const RowOutput& output, const Chunk& chunk, int row, int rows,
                             int part, int col) {
    const int lane = volatile_lane(), piece = lane % 8;
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
  }

  Chunk* chunks_;
  int turn_ = 0;
};

}  // namespace fomoe::cuda::sm90
