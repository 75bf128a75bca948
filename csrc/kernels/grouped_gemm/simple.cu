// SPDX-License-Identifier: Apache-2.0
// The products of products.h for every dtype, width and alignment: elements move one at a time.
#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "expert_mlp/activated.h"
#include "grouped_gemm/expert_rows.cuh"
#include "grouped_gemm/products.h"
#include "grouped_gemm/simple.cuh"

namespace fomoe::cuda::simple {
namespace {

/// Columns of b in a tile: kCols in a row, or, where a gate needs its up, kCols / 2 from each half.
struct ColumnTiles {
  int64_t features;  // F where there are gates and ups, else all columns
  bool is_paired;

  FOMOE_HOST_DEVICE int64_t width() const { return is_paired ? kCols / 2 : kCols; }
  FOMOE_HOST_DEVICE int64_t count() const { return ceil_div(features, width()); }
  /// Feature of local column c of tile n.
  FOMOE_HOST_DEVICE int64_t feature(int64_t n, int c) const { return n * width() + c % width(); }
  /// Column of b, or -1 past the last.
  FOMOE_HOST_DEVICE int64_t column(int64_t n, int c) const {
    const int64_t f = feature(n, c);
    return f >= features ? -1 : is_paired && c >= kCols / 2 ? features + f : f;
  }
};

template <typename T>
struct RowProductShared {
  Slice<Accumulate<T>> slice;
  int64_t source_rows[kRows];
};

template <typename Real>
FOMOE_DEVICE Activated<Real> activated_by(Activation activation, Real gate, Real up) {
  switch (activation) {
    case Activation::kSilu:
      return activated<Activation::kSilu>(gate, up);
    case Activation::kSwigluClamped:
      return activated<Activation::kSwigluClamped>(gate, up);
    default:
      return activated<Activation::kSwiglu>(gate, up);
  }
}

/// sums of one tile; rows of the source by slice.source_rows.
template <typename T>
FOMOE_DEVICE void multiply_rows(const RowProduct& product, const RowTile& tile,
                                const ColumnTiles& columns, int64_t n, RowProductShared<T>& shared,
                                Sums<Accumulate<T>>& sums) {
  const ExpertMatrices& b = product.b;
  const T* source = static_cast<const T*>(product.source.data);
  const T* matrix = static_cast<const T*>(b.data) + tile.expert * b.expert_stride;
  const int64_t depth = b.rows;
  const bool by_column = b.row_stride == 1;  // neighbours in memory are of one column
  const auto right_term = [&](int i) { return by_column ? i % kSlice : i / kCols; };
  const auto right_col = [&](int i) { return by_column ? i / kSlice : i % kCols; };
  multiply_tile<T>(
      depth, tile.end - tile.begin, shared.slice,
      [&](int64_t first, Fetched<T>& next) {
#pragma unroll
        for (int j = 0; j < next.kLeft; ++j) {
          const int i = threadIdx.x + j * kThreads;
          const int64_t k = first + i % kSlice, row = load_shared(shared.source_rows + i / kSlice);
          next.left[j] = row >= 0 && k < depth ? load_global(source + row * depth + k) : T{};
        }
#pragma unroll
        for (int j = 0; j < next.kRight; ++j) {
          const int i = threadIdx.x + j * kThreads;
          const int64_t k = first + right_term(i), column = columns.column(n, right_col(i));
          next.right[j] = column >= 0 && k < depth
                              ? load_global(matrix + k * b.row_stride + column * b.col_stride)
                              : T{};
        }
      },
      [&](const Fetched<T>& next, Slice<Accumulate<T>>& slice) {
#pragma unroll
        for (int j = 0; j < next.kLeft; ++j) {
          const int i = threadIdx.x + j * kThreads;
          store_shared(&slice.left[i % kSlice][i / kSlice], to_accumulate(next.left[j]));
        }
#pragma unroll
        for (int j = 0; j < next.kRight; ++j) {
          const int i = threadIdx.x + j * kThreads;
          store_shared(&slice.right[right_term(i)][right_col(i)], to_accumulate(next.right[j]));
        }
      },
      sums);
}

/// hidden and pre of the thread's sums.
template <typename T>
FOMOE_DEVICE void activate(const RowProduct& product, const RowTile& tile,
                           const ColumnTiles& columns, int64_t n, const Sums<Accumulate<T>>& sums) {
  const int64_t features = columns.features, cols = product.b.cols;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t row = tile.begin + sums.first_row() + i;
    if (row >= tile.end) break;
    T* pre = product.pre ? static_cast<T*>(product.pre) + row * cols : nullptr;
    T* hidden = static_cast<T*>(product.hidden) + row * features;
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      const int64_t f = columns.feature(n, sums.col(j));
      if (f >= features || (columns.is_paired && j >= kThreadCols / 2)) continue;
      const T gate = from_accumulate<T>(sums.values[i][j]);
      const T up = from_accumulate<T>(columns.is_paired ? sums.values[i][j % 2 + 2] : 0);
      const auto act = activated_by(product.activation, to_accumulate(gate), to_accumulate(up));
      store_global(hidden + f, from_accumulate<T>(act.value));
      if (pre) store_global(pre + f, gate);
      if (pre && columns.is_paired) store_global(pre + features + f, up);
    }
  }
}

/// The gradients of a row's features, and their part of the weight's.
template <typename T>
FOMOE_DEVICE void activate_backward(const RowProduct& product, const RowTile& tile,
                                    const ColumnTiles& columns, int64_t n,
                                    const Sums<Accumulate<T>>& sums) {
  using Real = Accumulate<T>;
  const bool gated = product.activation != Activation::kSilu;
  const int64_t features = columns.features, pre_dim = gated ? 2 * features : features;
  const int64_t slots = product.source.count * product.source.top_k;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t row = tile.begin + sums.first_row() + i;
    Real part = 0;
    if (row < tile.end) {
      const int64_t slot = load_global(product.source.slots + row);
      const Real weight = 0 <= slot && slot < slots
                              ? load_global(static_cast<const Real*>(product.weights) + slot)
                              : Real(0);
      const T* pre = static_cast<const T*>(product.pre) + row * pre_dim;
      T* d_pre = static_cast<T*>(product.d_pre) + row * pre_dim;
      T* hidden = static_cast<T*>(product.hidden) + row * features;
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        const int64_t f = columns.column(n, sums.col(j));
        if (f < 0) continue;
        const Real gate = to_accumulate(load_global(pre + f));
        const Real up = gated ? to_accumulate(load_global(pre + features + f)) : Real(0);
        const auto act = activated_by(product.activation, gate, up);
        const Real d_act = weight * sums.values[i][j];
        part += sums.values[i][j] * act.value;
        store_global(hidden + f, from_accumulate<T>(weight * act.value));
        store_global(d_pre + f, from_accumulate<T>(d_act * act.d_gate));
        if (gated) store_global(d_pre + features + f, from_accumulate<T>(d_act * act.d_up));
      }
    }
    // The lanes of a row are neighbours.
    for (int distance = kColThreads / 2; distance > 0; distance /= 2) {
      part += __shfl_xor_sync(kAllLanes, part, distance);
    }
    if (row < tile.end && threadIdx.x % kColThreads == 0) {
      store_global(static_cast<Real*>(product.weight_parts) + row * columns.count() + n, part);
    }
  }
}

template <typename T>
FOMOE_DEVICE void store(const RowProduct& product, const RowTile& tile, const ColumnTiles& columns,
                        int64_t n, const Sums<Accumulate<T>>& sums) {
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t row = tile.begin + sums.first_row() + i;
    if (row >= tile.end) break;
    T* out = static_cast<T*>(product.out) + row * product.b.cols;
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      const int64_t column = columns.column(n, sums.col(j));
      if (column >= 0) store_global(out + column, from_accumulate<T>(sums.values[i][j]));
    }
  }
}

template <typename T, Epilogue epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    row_product_kernel(const RowProduct product, const ColumnTiles columns) {
  using Real = Accumulate<T>;
  auto& shared = dynamic_shared<RowProductShared<T>>();
  const int64_t col_tiles = columns.count();
  const int64_t count = load_global(product.tiles.count) * col_tiles;
  for (int64_t item = blockIdx.x; item < count; item += gridDim.x) {
    const RowTile tile = load_global(product.tiles.tiles + item / col_tiles);
    const int64_t n = item % col_tiles;
    __syncthreads();  // the rows of the tile before are used up
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      const int64_t row = tile.begin + i;
      shared.source_rows[i] = row < tile.end ? source_row(product.source, row) : -1;
    }
    __syncthreads();
    Sums<Real> sums;
    multiply_rows<T>(product, tile, columns, n, shared, sums);
    if (product.bias) {
      const T* bias = static_cast<const T*>(product.bias) + tile.expert * product.b.cols;
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        const int64_t column = columns.column(n, sums.col(j));
        const Real value = column >= 0 ? to_accumulate(load_global(bias + column)) : Real(0);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) sums.values[i][j] += value;
      }
    }
    if constexpr (epilogue == Epilogue::kStore) store<T>(product, tile, columns, n, sums);
    if constexpr (epilogue == Epilogue::kActivate) activate<T>(product, tile, columns, n, sums);
    if constexpr (epilogue == Epilogue::kActivateBackward) {
      activate_backward<T>(product, tile, columns, n, sums);
    }
  }
}

/// The terms of these products are the rows of one expert, kSlice at a time.
template <typename T>
FOMOE_DEVICE void multiply_expert(const WeightProduct& product, const ExpertRows& rows,
                                  int64_t first_row, int64_t first_col, Slice<Accumulate<T>>& slice,
                                  Sums<Accumulate<T>>& sums) {
  const T* left = static_cast<const T*>(product.left.data);
  const T* right = static_cast<const T*>(product.right.data);
  multiply_tile<T>(
      rows.end - rows.begin, product.out_rows - first_row, slice,
      [&](int64_t first, Fetched<T>& next) {
#pragma unroll
        for (int j = 0; j < next.kLeft; ++j) {
          const int i = threadIdx.x + j * kThreads;
          const int64_t term = rows.begin + first + i / kRows, col = first_row + i % kRows;
          const int64_t row = term < rows.end ? source_row(product.left, term) : -1;
          next.left[j] = row >= 0 && col < product.out_rows
                             ? load_global(left + row * product.out_rows + col)
                             : T{};
        }
#pragma unroll
        for (int j = 0; j < next.kRight; ++j) {
          const int i = threadIdx.x + j * kThreads;
          const int64_t term = rows.begin + first + i / kCols, col = first_col + i % kCols;
          const int64_t row = term < rows.end ? source_row(product.right, term) : -1;
          next.right[j] = row >= 0 && col < product.out_cols
                              ? load_global(right + row * product.out_cols + col)
                              : T{};
        }
      },
      [&](const Fetched<T>& next, Slice<Accumulate<T>>& target) {
#pragma unroll
        for (int j = 0; j < next.kLeft; ++j) {
          const int i = threadIdx.x + j * kThreads;
          store_shared(&target.left[i / kRows][i % kRows], to_accumulate(next.left[j]));
        }
#pragma unroll
        for (int j = 0; j < next.kRight; ++j) {
          const int i = threadIdx.x + j * kThreads;
          store_shared(&target.right[i / kCols][i % kCols], to_accumulate(next.right[j]));
        }
      },
      sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) weight_product_kernel(const WeightProduct product) {
  auto& slice = dynamic_shared<Slice<Accumulate<T>>>();
  const int64_t col_tiles = ceil_div(product.out_cols, kCols);
  const int64_t tiles = ceil_div(product.out_rows, kRows) * col_tiles;
  for (int64_t item = blockIdx.x; item < product.num_experts * tiles; item += gridDim.x) {
    const int64_t expert = item / tiles, first_row = item % tiles / col_tiles * kRows;
    const int64_t first_col = item % col_tiles * kCols;
    Sums<Accumulate<T>> sums;
    multiply_expert<T>(product, rows_of(product.offsets, expert, product.num_rows), first_row,
                       first_col, slice, sums);
    T* out = static_cast<T*>(product.out) + expert * product.out_rows * product.out_cols;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int64_t row = first_row + sums.first_row() + i;
      if (row >= product.out_rows) break;
#pragma unroll
      for (int j = 0; j < kThreadCols; ++j) {
        const int64_t col = first_col + sums.col(j);
        if (col >= product.out_cols) continue;
        store_global(out + row * product.out_cols + col, from_accumulate<T>(sums.values[i][j]));
      }
    }
  }
}

template <typename T, Epilogue epilogue>
void launch_rows(const char* name, const RowProduct& product, Stream stream) {
  const bool is_paired = epilogue == Epilogue::kActivate && is_gated(product.activation);
  const ColumnTiles columns = {is_paired ? product.cols() / 2 : product.cols(), is_paired};
  launch({name, blocks_for(product.tiles.most * columns.count()), kThreads,
          sizeof(RowProductShared<T>)},
         stream, row_product_kernel<T, epilogue>, product, columns);
}

}  // namespace

int64_t num_weight_parts(int64_t expert_dim) { return ceil_div(expert_dim, kCols); }

void multiply(const RowProduct& product, Stream stream) {
  dispatch(product.dtype(), [&](auto tag) {
    using T = decltype(tag);
    switch (product.epilogue) {
      case Epilogue::kStore:
        return launch_rows<T, Epilogue::kStore>("simple_store", product, stream);
      case Epilogue::kActivate:
        return launch_rows<T, Epilogue::kActivate>("simple_activate", product, stream);
      case Epilogue::kActivateBackward:
        return launch_rows<T, Epilogue::kActivateBackward>("simple_activate_backward", product,
                                                           stream);
    }
  });
}

void multiply(const WeightProduct& product, Stream stream) {
  const int64_t tiles =
      product.num_experts * ceil_div(product.out_rows, kRows) * ceil_div(product.out_cols, kCols);
  dispatch(product.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch({"simple_weight_product", blocks_for(tiles), kThreads, sizeof(Slice<Accumulate<T>>)},
           stream, weight_product_kernel<T>, product);
  });
}

}  // namespace fomoe::cuda::simple
