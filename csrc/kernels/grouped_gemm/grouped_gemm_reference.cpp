// SPDX-License-Identifier: Apache-2.0
#include "fomoe/grouped_gemm.h"

namespace fomoe::reference {

void grouped_gemm(const double* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, double* out) {
  for (int64_t i = 0; i < num_rows * b.cols; ++i) out[i] = 0;
  for (int64_t expert = 0; expert < b.num_experts; ++expert) {
    const double* matrix = static_cast<const double*>(b[expert].data);
    for (int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
      for (int64_t col = 0; col < b.cols; ++col) {
        for (int64_t k = 0; k < b.rows; ++k) {
          out[row * b.cols + col] +=
              rows[row * b.rows + k] * matrix[k * b.row_stride + col * b.col_stride];
        }
      }
    }
  }
}

void grouped_gemm_wgrad(const double* left, const double* right, const int32_t* offsets,
                        int64_t num_local_experts, int64_t out_rows, int64_t out_cols,
                        double* out) {
  for (int64_t i = 0; i < num_local_experts * out_rows * out_cols; ++i) out[i] = 0;
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    for (int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
      for (int64_t i = 0; i < out_rows; ++i) {
        for (int64_t j = 0; j < out_cols; ++j) {
          out[(expert * out_rows + i) * out_cols + j] +=
              left[row * out_rows + i] * right[row * out_cols + j];
        }
      }
    }
  }
}

}  // namespace fomoe::reference
