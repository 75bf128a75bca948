// SPDX-License-Identifier: Apache-2.0
#include "fomoe/gemm.h"

namespace fomoe::reference {
namespace {

template <typename T>
double element(const Matrix& matrix, int64_t row, int64_t col) {
  const T* data = static_cast<const T*>(matrix.data);
  return to_accumulate(data[row * matrix.row_stride + col * matrix.col_stride]);
}

void multiply(void*, DType dtype, const Matrix& a, const Matrix& b, const void* bias,
              const DenseMatrix& c) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t col = 0; col < c.cols; ++col) {
        double sum = bias ? to_accumulate(static_cast<const T*>(bias)[col]) : 0;
        for (int64_t k = 0; k < a.cols; ++k) sum += element<T>(a, row, k) * element<T>(b, k, col);
        static_cast<T*>(c.data)[row * c.cols + col] =
            from_accumulate<T>(static_cast<Accumulate<T>>(sum));
      }
    }
  });
}

}  // namespace

Gemm gemm() { return {&multiply, nullptr}; }

}  // namespace fomoe::reference
