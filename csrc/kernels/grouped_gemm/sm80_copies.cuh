// SPDX-License-Identifier: Apache-2.0
// Where a tile's operands come from: copy(stage) starts the copies of the next 32 steps of depth.
// Rows and columns that do not exist, and steps past the depth, become zeros: their addresses mean
// nothing and are not read. That the bytes to copy are written as a choice of 16 or 0 matters: then
// it is one predicate of the instruction.
#pragma once

#include "cuda/quotient.cuh"
#include "grouped_gemm/sm80_tile.cuh"

namespace fomoe::cuda::sm80 {

inline constexpr int64_t kElementBytes = 2;

/// Two runs of 64 columns.
struct Columns {
  int32_t first[2], end[2];

  /// First column of a chunk of the tile, or -1 if there is none.
  FOMOE_DEVICE int of_chunk(int chunk) const {
    // Selected, not indexed: an index known at run time would need local memory.
    const int column = (chunk < 8 ? first[0] : first[1]) + chunk % 8 * kChunkElements;
    return column < (chunk < 8 ? end[0] : end[1]) ? column : -1;
  }
};

/// Columns [128 tile, 128 (tile + 1)) of a matrix of `cols` columns.
FOMOE_DEVICE Columns consecutive_columns(int64_t tile, int64_t all) {
  const auto first = static_cast<int>(tile * kTileCols), cols = static_cast<int>(all);
  return {{first, first + kTileCols / 2}, {cols, cols}};
}

/// Columns [64 tile, 64 (tile + 1)) of the left and of the right half of the matrix.
FOMOE_DEVICE Columns columns_of_both_halves(int64_t tile, int64_t all) {
  const auto first = static_cast<int>(tile * (kTileCols / 2)), cols = static_cast<int>(all);
  const int half = cols / 2;
  return {{first, half + first}, {half, cols}};
}

/// The row of `source` that row `row` of the product stands for, or -1: a row of zeros.
FOMOE_DEVICE int64_t source_row(const RowSource& source, int64_t row) {
  int64_t result = row;
  if (source.slots != nullptr) {
    const int32_t slot = load_global(source.slots + row);
    if (slot < 0) return -1;
    result = static_cast<uint32_t>(slot) / static_cast<uint32_t>(source.top_k);
  }
  return result < source.count ? result : -1;
}

/// Rows of a source along the depth: those of a tile, gathered.
class SourceRows {
 public:
  FOMOE_DEVICE SourceRows(const RowSource& source, int64_t width, const RowTile& tile)
      : width_bytes_(static_cast<uint32_t>(width * kElementBytes)),
        next_(static_cast<const char*>(source.data) + Tile::chunk() * sizeof(Chunk)),
        depth_left_(static_cast<int>(width) - Tile::chunk() * kChunkElements) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = tile.begin + Tile::line() + i * Tile::kLinesApart;
      rows_[i] = row < tile.end ? static_cast<uint32_t>(source_row(source, row)) : kNoRow;
    }
  }

  FOMOE_DEVICE void copy(Chunk* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async_16(stage + Tile::copy_index(i), next_ + uint64_t{rows_[i]} * width_bytes_,
                  rows_[i] != kNoRow && depth_left_ > 0 ? 16 : 0);
    }
    next_ += kTileDepth * kElementBytes;
    depth_left_ -= kTileDepth;
  }

 private:
  using Tile = Layout<Lines::kAlongDepth>;
  static constexpr uint32_t kNoRow = 0xffffffff;  // what -1 becomes
  uint32_t width_bytes_;
  const char* next_;  // this thread's next chunk of row 0
  int depth_left_;    // from that chunk on
  uint32_t rows_[kCopies];
};

/// Columns of an expert's matrix along the depth, `stride` elements apart.
class ColumnsAlongDepth {
 public:
  FOMOE_DEVICE ColumnsAlongDepth(const void* data, int64_t depth, int64_t stride,
                                 const Columns& columns)
      : stride_(stride * kElementBytes),
        second_(int64_t{columns.first[1] - columns.first[0]} * stride_),
        next_(static_cast<const char*>(data) + (columns.first[0] + Tile::line()) * stride_ +
              Tile::chunk() * sizeof(Chunk)),
        depth_left_(static_cast<int>(depth) - Tile::chunk() * kChunkElements),
        columns_left_{columns.end[0] - columns.first[0] - Tile::line(),
                      columns.end[1] - columns.first[1] - Tile::line()} {}

  FOMOE_DEVICE void copy(Chunk* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int line = i % 2 * Tile::kLinesApart;  // of the run
      cp_async_16(stage + Tile::copy_index(i), next_ + line * stride_ + i / 2 * second_,
                  line < columns_left_[i / 2] && depth_left_ > 0 ? 16 : 0);
    }
    next_ += kTileDepth * kElementBytes;
    depth_left_ -= kTileDepth;
  }

 private:
  using Tile = Layout<Lines::kAlongDepth>;
  static_assert(kCopies == 4, "two for each run of columns");
  int64_t stride_, second_;  // bytes from a column to the next, from a run to the other
  const char* next_;         // this thread's next chunk of its first column
  int depth_left_;           // from that chunk on
  int columns_left_[2];      // from this thread's first column of a run on
};

/// Columns of an expert's matrix whose rows, `stride` elements apart, are steps of depth.
class ColumnsAcross {
 public:
  /// offset: elements from the beginning of a line to this thread's chunk, or -1.
  FOMOE_DEVICE ColumnsAcross(const void* data, int64_t depth, int64_t stride, int64_t offset)
      : stride_(stride * kElementBytes),
        depth_left_(offset < 0 ? 0 : static_cast<int>(depth) - Tile::line()),
        next_(static_cast<const char*>(data) + Tile::line() * stride_ +
              (offset < 0 ? 0 : offset) * kElementBytes) {}

  FOMOE_DEVICE void copy(Chunk* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async_16(stage + Tile::copy_index(i), next_, depth_left_ > i * Tile::kLinesApart ? 16 : 0);
      next_ += Tile::kLinesApart * stride_;
    }
    depth_left_ -= kTileDepth;
  }

 private:
  using Tile = Layout<Lines::kAcross>;
  int64_t stride_;  // bytes
  int depth_left_;  // from this thread's next line on
  const char* next_;
};

/// A source whose rows are steps of depth.
struct GatheredSource {
  const void* data;
  const int32_t* slots;
  uint32_t count, width_bytes;
  Quotient token_of;  // of a slot, or of a row where nothing is gathered
};

inline GatheredSource gathered(const RowSource& source, int64_t width) {
  return {source.data, source.slots, static_cast<uint32_t>(source.count),
          static_cast<uint32_t>(width * kElementBytes),
          divided_by(source.slots == nullptr ? 1 : source.top_k)};
}

/// Rows [begin, end) of the product, gathered.
class GatheredLines {
 public:
  /// offset: elements from the beginning of a row to this thread's chunk, or -1.
  FOMOE_DEVICE GatheredLines(const GatheredSource& gathered, int begin, int end, int offset)
      : gathered_(gathered),
        data_(static_cast<const char*>(gathered.data) +
              int64_t{offset < 0 ? 0 : offset} * kElementBytes),
        row_(begin + Tile::line()),
        end_(offset < 0 ? begin : end) {
    look_ahead();
  }

  FOMOE_DEVICE void copy(Chunk* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t token = gathered_.token_of(static_cast<uint32_t>(names_[i]));
      cp_async_16(stage + Tile::copy_index(i), data_ + uint64_t{token} * gathered_.width_bytes,
                  names_[i] >= 0 && token < gathered_.count ? 16 : 0);
    }
    row_ += kTileDepth;
    look_ahead();
  }

 private:
  using Tile = Layout<Lines::kAcross>;

  /// Slots are read one stage before they are needed.
  FOMOE_DEVICE void look_ahead() {
    const int32_t* slots = gathered_.slots;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = row_ + i * Tile::kLinesApart;
      names_[i] = row < end_ ? row : -1;
      if (slots != nullptr && row < end_) names_[i] = load_global(slots + row);
    }
  }

  const GatheredSource& gathered_;
  const char* data_;
  int row_, end_;
  int names_[kCopies];  // of the next lines: their slots, or rows; -1 past the end
};

}  // namespace fomoe::cuda::sm80
