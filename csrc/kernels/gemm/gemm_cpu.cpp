// SPDX-License-Identifier: Apache-2.0
// Products of few rows or few terms, where a library spends more time on preparing its operands
// than on the product. They read b once and are bound by memory: decoding, and experts that got one
// or two tokens of a small batch.
#include <algorithm>

#include "fomoe/gemm.h"
#include "fomoe/parallel.h"
#include "fomoe/vectorize.h"
#include "gemm_bf16.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kFew = 4;            // rows of a, or terms of each sum
constexpr int64_t kTileColumns = 256;  // sums of kFew rows stay in the first level cache
constexpr int64_t kElementsPerThread = 65536;

template <typename T>
FOMOE_INLINE Accumulate<T> bias_at(const void* bias, int64_t column) {
  return bias ? to_accumulate(static_cast<const T*>(bias)[column]) : Accumulate<T>(0);
}

/// Columns [begin, end) of c; b has dense columns and a dense rows: each element is one dot
/// product.
template <typename T>
FOMOE_VECTORIZED void dot_columns(const Matrix& a, const Matrix& b, const void* bias,
                                  const DenseMatrix& c, int64_t begin, int64_t end) {
  const T* left = static_cast<const T*>(a.data);
  const T* right = static_cast<const T*>(b.data);
  T* out = static_cast<T*>(c.data);
  for (int64_t col = begin; col < end; ++col) {
    const T* column = right + col * b.col_stride;
    for (int64_t row = 0; row < a.rows; ++row) {
      const T* values = left + row * a.row_stride;
      const auto sum = sum_of<Accumulate<T>>(
          a.cols, [&](int64_t k) { return to_accumulate(values[k]) * to_accumulate(column[k]); });
      out[row * c.cols + col] = from_accumulate<T>(sum + bias_at<T>(bias, col));
    }
  }
}

/// Columns [begin, end) of c; b has dense rows: each is added, scaled, to the rows of c.
template <typename T>
FOMOE_VECTORIZED void add_rows(const Matrix& a, const Matrix& b, const void* bias,
                               const DenseMatrix& c, int64_t begin, int64_t end) {
  using Real = Accumulate<T>;
  const T* left = static_cast<const T*>(a.data);
  const T* right = static_cast<const T*>(b.data);
  T* out = static_cast<T*>(c.data);
  Real sums[kFew][kTileColumns];
  for (int64_t tile = begin; tile < end; tile += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, end - tile);
    for (int64_t first = 0; first < a.rows; first += kFew) {
      const int64_t rows = std::min(kFew, a.rows - first);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < columns; ++i) sums[row][i] = bias_at<T>(bias, tile + i);
      }
      for (int64_t k = 0; k < a.cols; ++k) {
        const T* values = right + k * b.row_stride + tile;
        for (int64_t row = 0; row < rows; ++row) {
          const Real factor = to_accumulate(left[(first + row) * a.row_stride + k * a.col_stride]);
          for (int64_t i = 0; i < columns; ++i) sums[row][i] += factor * to_accumulate(values[i]);
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        T* target = out + (first + row) * c.cols + tile;
        for (int64_t i = 0; i < columns; ++i) target[i] = from_accumulate<T>(sums[row][i]);
      }
    }
  }
}

/// Whether the product was small enough to be done here.
template <typename T>
bool multiply_few(const Matrix& a, const Matrix& b, const void* bias, const DenseMatrix& c) {
  if (a.rows > kFew && a.cols > kFew) return false;
  const bool is_dots = a.rows <= kFew && b.row_stride == 1 && a.col_stride == 1;
  if (!is_dots && b.col_stride != 1) return false;
  const int64_t work_per_column = a.rows * a.cols;
  parallel_for(c.cols, ceil_div(kElementsPerThread, work_per_column),
               [&](int64_t begin, int64_t end) {
                 is_dots ? dot_columns<T>(a, b, bias, c, begin, end)
                         : add_rows<T>(a, b, bias, c, begin, end);
               });
  return true;
}

}  // namespace

void multiply(const Gemm& library, DType dtype, const Matrix& a, const Matrix& b, const void* bias,
              const DenseMatrix& c) {
  bool is_done = false;
  dispatch(dtype, [&](auto element) { is_done = multiply_few<decltype(element)>(a, b, bias, c); });
  if (!is_done && dtype == DType::kBFloat16) is_done = multiply_bf16(a, b, bias, c);
  if (!is_done) library(dtype, a, b, bias, c);
}

}  // namespace fomoe::cpu
