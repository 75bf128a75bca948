// SPDX-License-Identifier: Apache-2.0
// Matrix products are a service that the caller brings: csrc/torch passes torch's own, the C++
// tests a plain loop. Kernels describe operands by strides, so that nothing is copied to transpose
// it.
#pragma once

#include "fomoe/dtype.h"

namespace fomoe {

/// A view of rows x cols elements; strides count elements.
struct Matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

/// Where a product is written: dense rows.
struct DenseMatrix {
  void* data;
  int64_t rows;
  int64_t cols;

  Matrix view() const { return {data, rows, cols, cols, 1}; }
};

/// One matrix per expert.
struct ExpertMatrices {
  DType dtype;
  const void* data;
  int64_t num_experts;
  int64_t rows;
  int64_t cols;
  int64_t expert_stride;
  int64_t row_stride;
  int64_t col_stride;

  Matrix operator[](int64_t expert) const {
    const char* first = static_cast<const char*>(data);
    return {first + expert * expert_stride * size_of(dtype), rows, cols, row_stride, col_stride};
  }
  ExpertMatrices transposed() const {
    return {dtype, data, num_experts, cols, rows, expert_stride, col_stride, row_stride};
  }
};

/// c = a b + bias, every operand of type dtype, sums in its accumulation type or better, each
/// element rounded once. bias [c.cols] may be nullptr. No extent is zero. May throw; kernels call
/// it outside of parallel regions.
struct Gemm {
  using Function = void (*)(void* context, DType dtype, const Matrix& a, const Matrix& b,
                            const void* bias, const DenseMatrix& c);
  Function function;
  void* context;

  void operator()(DType dtype, const Matrix& a, const Matrix& b, const void* bias,
                  const DenseMatrix& c) const {
    function(context, dtype, a, b, bias, c);
  }
};

namespace cpu {
/// The same, by kernels of our own where they are faster than a library's, else by `library`.
void multiply(const Gemm& library, DType dtype, const Matrix& a, const Matrix& b, const void* bias,
              const DenseMatrix& c);
}  // namespace cpu

namespace reference {
/// Three loops, sums in double.
Gemm gemm();
}  // namespace reference

}  // namespace fomoe
