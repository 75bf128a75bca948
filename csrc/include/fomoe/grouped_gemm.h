// SPDX-License-Identifier: Apache-2.0
// grouped_gemm: rows of every expert times that expert's matrix.
//
//   out[r] = rows[r] B[e]                for r in [offsets[e], offsets[e+1]), zero past offsets[-1]
//   wgrad: out[e] = sum_r left[r]^T right[r], zero for an expert without rows
//
// rows are never read past offsets[-1]. The transposed product and the gradient of rows are the
// same function with B's strides exchanged.
#pragma once

#include "fomoe/cuda.h"
#include "fomoe/gemm.h"
#include "fomoe/kernel_path.h"

namespace fomoe {

/// Longest run of rows in one product. A cap keeps a run's operands in the cache, and bounds the
/// number of shapes for which a matrix library prepares code.
inline constexpr int64_t kRowsPerGemm = 512;

namespace cpu {
/// rows [num_rows, b.rows], out [num_rows, b.cols], dense, of type b.dtype; scratch of
/// kGemmScratchBytes.
void grouped_gemm(const void* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, const Gemm& gemm, void* out, void* scratch);

/// left [num_rows, out_rows], right [num_rows, out_cols], dense; out [E_local, out_rows, out_cols].
void grouped_gemm_wgrad(DType dtype, const void* left, const void* right, const int32_t* offsets,
                        int64_t num_local_experts, int64_t out_rows, int64_t out_cols,
                        const Gemm& gemm, void* out, void* scratch);
}  // namespace cpu

namespace cuda {
int64_t grouped_gemm_workspace_bytes(int64_t num_rows, int64_t num_local_experts);

/// path: one that choose_path allows for these operands.
void grouped_gemm(KernelPath path, const void* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, void* out, void* workspace, Stream stream);
void grouped_gemm_wgrad(KernelPath path, DType dtype, const void* left, const void* right,
                        int64_t num_rows, const int32_t* offsets, int64_t num_local_experts,
                        int64_t out_rows, int64_t out_cols, void* out, Stream stream);
}  // namespace cuda

namespace reference {
/// b of type double.
void grouped_gemm(const double* rows, int64_t num_rows, const ExpertMatrices& b,
                  const int32_t* offsets, double* out);
void grouped_gemm_wgrad(const double* left, const double* right, const int32_t* offsets,
                        int64_t num_local_experts, int64_t out_rows, int64_t out_cols, double* out);
}  // namespace reference

}  // namespace fomoe
