// SPDX-License-Identifier: Apache-2.0
// The experts run one after the other; the matrix library uses the threads.
#include "fomoe/grouped_gemm.h"

#include <algorithm>

#include "fomoe/rows.h"

namespace fomoe::cpu {

void grouped_gemm(const void* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, const Gemm& gemm, void* out) {
  const DType dtype = b.dtype;
  const ConstRows in_rows = {rows, dtype, b.rows};
  const Rows out_rows = {out, dtype, b.cols};
  if (b.rows == 0 || b.cols == 0) return out_rows.fill_zero(0, num_rows);
  for (int64_t expert = 0; expert < b.num_experts; ++expert) {
    for (int64_t row = offsets[expert]; row < offsets[expert + 1]; row += kRowsPerGemm) {
      const int64_t count = std::min<int64_t>(kRowsPerGemm, offsets[expert + 1] - row);
      multiply(gemm, dtype, in_rows.run(row, count), b[expert], nullptr, out_rows.run(row, count));
    }
  }
  const int64_t executed = offsets[b.num_experts];
  out_rows.fill_zero(executed, num_rows - executed);
}

void grouped_gemm_wgrad(DType dtype, const void* left, const void* right, const int32_t* offsets,
                        int64_t num_local_experts, int64_t out_rows, int64_t out_cols,
                        const Gemm& gemm, void* out) {
  const ConstRows left_rows = {left, dtype, out_rows}, right_rows = {right, dtype, out_cols};
  const Rows matrices = {out, dtype, out_rows * out_cols};
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    const int64_t first = offsets[expert], count = offsets[expert + 1] - first;
    if (count == 0 || matrices.width == 0) {
      matrices.fill_zero(expert, 1);
      continue;
    }
    multiply(gemm, dtype, left_rows.run(first, count).transposed(), right_rows.run(first, count),
             nullptr, {matrices.at(expert), out_rows, out_cols});
  }
}

}  // namespace fomoe::cpu
