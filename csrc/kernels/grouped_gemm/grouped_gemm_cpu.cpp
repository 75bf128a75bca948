// SPDX-License-Identifier: Apache-2.0
// The experts run one after the other; the matrix library uses the threads.
#include "fomoe/grouped_gemm.h"

#include <algorithm>

namespace fomoe::cpu {
namespace {

char* row_of(void* data, DType dtype, int64_t row, int64_t width) {
  return static_cast<char*>(data) + row * width * size_of(dtype);
}

const char* row_of(const void* data, DType dtype, int64_t row, int64_t width) {
  return static_cast<const char*>(data) + row * width * size_of(dtype);
}

}  // namespace

void grouped_gemm(const void* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, const Gemm& gemm, void* out) {
  const DType dtype = b.dtype;
  if (num_rows == 0 || b.cols == 0) return;
  const int64_t executed = b.rows == 0 ? 0 : offsets[b.num_experts];
  for (int64_t expert = 0; expert < b.num_experts && executed > 0; ++expert) {
    for (int64_t row = offsets[expert]; row < offsets[expert + 1]; row += kRowsPerGemm) {
      const int64_t count = std::min<int64_t>(kRowsPerGemm, offsets[expert + 1] - row);
      const Matrix a = {row_of(rows, dtype, row, b.rows), count, b.rows, b.rows, 1};
      gemm(dtype, a, b[expert], {row_of(out, dtype, row, b.cols), count, b.cols});
    }
  }
  const int64_t tail_bytes = (num_rows - executed) * b.cols * size_of(dtype);
  std::memset(row_of(out, dtype, executed, b.cols), 0, static_cast<size_t>(tail_bytes));
}

void grouped_gemm_wgrad(DType dtype, const void* left, const void* right, const int32_t* offsets,
                        int64_t num_local_experts, int64_t out_rows, int64_t out_cols,
                        const Gemm& gemm, void* out) {
  const int64_t size = out_rows * out_cols;
  if (size == 0) return;
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    const int64_t row = offsets[expert], count = offsets[expert + 1] - row;
    char* target = row_of(out, dtype, expert, size);
    if (count == 0) {
      std::memset(target, 0, static_cast<size_t>(size * size_of(dtype)));
      continue;
    }
    const Matrix a = {row_of(left, dtype, row, out_rows), count, out_rows, out_rows, 1};
    const Matrix b = {row_of(right, dtype, row, out_cols), count, out_cols, out_cols, 1};
    gemm(dtype, a.transposed(), b, {target, out_rows, out_cols});
  }
}

}  // namespace fomoe::cpu
