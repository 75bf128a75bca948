// SPDX-License-Identifier: Apache-2.0
// One tile of a product on CUDA cores: 128 x 64 sums, 8 x 4 per thread, the operands in shared
// memory in slices of 16 terms, already in the accumulation type. The slice after the current one
// waits in registers. A thread adds its terms one after the other.
#pragma once

#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "fomoe/dtype.h"
#include "grouped_gemm/products.h"

namespace fomoe::cuda::simple {

constexpr int kThreads = 256;
constexpr int kRows = kTileRows, kCols = 64, kSlice = 16;
constexpr int kThreadRows = 8, kThreadCols = 4;
constexpr int kColThreads = kCols / kThreadCols;  // threads next to each other in a row

template <typename Real>
struct Slice {
  Real left[kSlice][kRows + 4];  // 4: lanes that store down a column meet other banks
  Real right[kSlice][kCols + 4];
};

/// `count` neighbours that move in one access.
template <typename Real, int count>
struct alignas(sizeof(Real) * count) Pack {
  Real values[count];
};

/// The thread's part of a tile: rows row(0).. next to each other, columns in two pairs, one in each
/// half of the tile, so that a gate and its up meet in one thread.
template <typename Real>
struct Sums {
  Real values[kThreadRows][kThreadCols];

  static FOMOE_DEVICE int first_row() { return threadIdx.x / kColThreads * kThreadRows; }
  static FOMOE_DEVICE int col(int j) {
    return j / 2 * (kCols / 2) + threadIdx.x % kColThreads * 2 + j % 2;
  }
};

/// The thread's elements of the next slice.
template <typename T>
struct Fetched {
  static constexpr int kLeft = kRows * kSlice / kThreads, kRight = kCols * kSlice / kThreads;
  T left[kLeft], right[kRight];
};

template <typename Real>
FOMOE_DEVICE void add_slice(const Slice<Real>& slice, Sums<Real>& sums) {
  using Pair = Pack<Real, 2>;
  constexpr int kWide = 16 / sizeof(Real);
  using Wide = Pack<Real, kWide>;
#pragma unroll
  for (int k = 0; k < kSlice; ++k) {
    Real left[kThreadRows], right[kThreadCols];
#pragma unroll
    for (int i = 0; i < kThreadRows; i += kWide) {
      const Wide wide =
          load_shared(reinterpret_cast<const Wide*>(&slice.left[k][sums.first_row() + i]));
#pragma unroll
      for (int j = 0; j < kWide; ++j) left[i + j] = wide.values[j];
    }
#pragma unroll
    for (int j = 0; j < kThreadCols; j += 2) {
      const Pair pair = load_shared(reinterpret_cast<const Pair*>(&slice.right[k][sums.col(j)]));
      right[j] = pair.values[0];
      right[j + 1] = pair.values[1];
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) sums.values[i][j] += left[i] * right[j];
    }
  }
}

/// sums = the product over `depth` terms. fetch(k, fetched) reads the elements of the slice that
/// begins at term k, zeros past the last; place(fetched, slice) writes them to where they belong.
/// Threads whose first row is num_rows or more have nothing to add.
template <typename T, typename Fetch, typename Place>
FOMOE_DEVICE void multiply_tile(int64_t depth, int64_t num_rows, Slice<Accumulate<T>>& slice,
                                const Fetch& fetch, const Place& place, Sums<Accumulate<T>>& sums) {
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) sums.values[i][j] = 0;
  }
  Fetched<T> next;
  fetch(int64_t{0}, next);
  for (int64_t k = 0; k < depth; k += kSlice) {
    __syncthreads();  // the slice before is used up
    place(next, slice);
    __syncthreads();
    if (k + kSlice < depth) fetch(k + kSlice, next);
    if (sums.first_row() < num_rows) add_slice(slice, sums);
  }
}

/// Row of the source that row r of a product is made of; -1: a row of zeros.
FOMOE_DEVICE int64_t source_row(const RowSource& source, int64_t r) {
  if (source.slots == nullptr) return r;
  const int64_t slot = load_global(source.slots + r);
  return 0 <= slot && slot < source.count * source.top_k ? slot / source.top_k : -1;
}

/// How many blocks share `tiles` tiles. Fixed by the host, whatever the device finds in its tables.
inline int64_t blocks_for(int64_t tiles) {
  const int64_t most = int64_t{8} * multiprocessor_count();
  return tiles < most ? tiles : most;
}

}  // namespace fomoe::cuda::simple
