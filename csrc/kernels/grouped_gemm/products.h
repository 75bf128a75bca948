// SPDX-License-Identifier: Apache-2.0
// The two matrix products of the CUDA kernels, as data. Every family of kernels (simple, sm80,
// sm90) computes both, in all variants; the ops are written on top of them.
#pragma once

#include "fomoe/cuda.h"
#include "fomoe/expert_mlp.h"
#include "fomoe/gemm.h"
#include "fomoe/kernel_path.h"

namespace fomoe::cuda {

/// Rows of a tile of every family. A tile has rows of one expert only.
inline constexpr int kTileRows = 128;

/// Rows [begin, end) of an expert, at most kTileRows. 16 bytes, read in one access.
struct alignas(16) RowTile {
  int32_t expert, begin, end, unused;
};

/// Every executed row in exactly one tile, by expert, then row. Made on the device by
/// list_row_tiles, so that no host needs to know the offsets.
struct RowTiles {
  const RowTile* tiles;  // [most]
  const int32_t* count;  // [1]: how many there are
  int64_t most;          // bound on it
};

/// Reached when every expert but one has one row.
inline int64_t most_row_tiles(int64_t num_rows, int64_t num_experts) {
  const int64_t experts_with_rows = num_experts < num_rows ? num_experts : num_rows;
  return experts_with_rows + (num_rows - experts_with_rows) / kTileRows;
}

/// Bytes of the workspace of list_row_tiles.
int64_t row_tiles_bytes(int64_t num_rows, int64_t num_experts);

/// Lists the tiles into `workspace`. Offsets are clamped as rows_of (expert_rows.cuh) does.
RowTiles list_row_tiles(const int32_t* offsets, int64_t num_experts, int64_t num_rows,
                        void* workspace, Stream stream);

/// Sets rows [offsets[num_experts], num_rows) of a dense array to zero.
void zero_rows_past_end(const int32_t* offsets, int64_t num_experts, int64_t num_rows,
                        int64_t row_bytes, void* rows, Stream stream);

/// Dense rows of `dtype`, one per row of the product: row r itself, or, with slots, the token that
/// row r was routed from, slots[r] / top_k. A slot outside [0, count * top_k) stands for a row of
/// zeros.
struct RowSource {
  const void* data;      // [count, width]
  int64_t count;         // rows that exist
  const int32_t* slots;  // row_to_slot [num_rows], or nullptr
  int64_t top_k;         // with slots
};

enum class Epilogue : int32_t {
  kStore,             // out = sum
  kActivate,          // pre = sum, hidden = act(pre)
  kActivateBackward,  // sum is d_hidden, the gradient without the combine weight
};

/// For every row r of expert e:  sum[r] = source[r] b[e] + bias[e], in the accumulation type, then
/// the epilogue. Reads and writes executed rows only. In letters: [R, depth] x [E, depth, cols].
struct RowProduct {
  RowSource source;
  ExpertMatrices b;  // rows = depth, cols; one of its strides is 1
  const void* bias;  // [E, cols], dense, or nullptr
  int64_t num_rows;  // R
  RowTiles tiles;
  Epilogue epilogue;

  void* out;  // kStore: [R, cols]

  Activation activation;  // the rest: kActivate and kActivateBackward
  void* hidden;           // [R, F]. kActivate: act of the rounded pre, cols = F or 2F.
                          // kActivateBackward: weight * act(pre), cols = F
  void* pre;              // [R, P]. kActivate: written, or nullptr. kActivateBackward: read
  const void* weights;    // [T * K] accumulation type, by source.slots[r]
  void* d_pre;            // [R, P]: weight * d_hidden * act'(pre)
  void* weight_parts;     // [R, num_weight_parts] accumulation type: the sums over the columns of
                          // each part of d_hidden * act(pre)

  DType dtype() const { return b.dtype; }
  int64_t depth() const { return b.rows; }
  int64_t cols() const { return b.cols; }
};

/// out[e] = sum over the rows r of expert e of left[r]^T right[r]; zero for an expert without rows.
/// Rows of other experts, and those past the last executed one, may hold NaN and do not matter.
struct WeightProduct {
  DType dtype;
  RowSource left;          // width out_rows
  RowSource right;         // width out_cols
  int64_t num_rows;        // R
  const int32_t* offsets;  // [E + 1]; clamped as in rows_of, expert_rows.cuh
  int64_t num_experts;     // E
  int64_t out_rows, out_cols;
  void* out;  // [E, out_rows, out_cols]
};

namespace simple {
int64_t num_weight_parts(int64_t expert_dim);
void multiply(const RowProduct& product, Stream stream);
void multiply(const WeightProduct& product, Stream stream);
}  // namespace simple

namespace sm80 {
int64_t num_weight_parts(int64_t expert_dim);
void multiply(const RowProduct& product, Stream stream);
void multiply(const WeightProduct& product, Stream stream);
}  // namespace sm80

namespace sm90 {
int64_t num_weight_parts(int64_t expert_dim);
void multiply(const RowProduct& product, Stream stream);
void multiply(const WeightProduct& product, Stream stream);
}  // namespace sm90

/// Of the family `path`.
int64_t num_weight_parts(KernelPath path, int64_t expert_dim);
void multiply(KernelPath path, const RowProduct& product, Stream stream);
void multiply(KernelPath path, const WeightProduct& product, Stream stream);

}  // namespace fomoe::cuda
