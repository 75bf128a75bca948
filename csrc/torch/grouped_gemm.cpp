// SPDX-License-Identifier: Apache-2.0
#include "fomoe/grouped_gemm.h"

#include "aten_gemm.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

/// Checks the offsets and makes them dense.
Tensor dense_offsets(const char* op, const Tensor& offsets, int64_t num_rows) {
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check(offsets.dim() == 1 && offsets.size(0) >= 1, "fomoe::", op,
        ": offsets must have shape (E_local + 1,), got ", shape_of(offsets));
  const Tensor dense = torch::stable::contiguous(offsets);
  const char* defect =
      cpu::defect_of_offsets(values_of<int32_t>(dense), offsets.size(0) - 1, num_rows);
  check(!defect, "fomoe::", op, ": ", defect ? defect : "", "; there are ", num_rows, " rows");
  return dense;
}

}  // namespace

Tensor grouped_gemm_cpu(const Tensor& rows, const Tensor& weight, const Tensor& offsets,
                        bool transpose_weight) {
  const char* op = "grouped_gemm";
  adopt_num_threads();
  float_dtype(op, "rows", rows);
  check_shape(op, "rows", rows, {-1, -1}, "(R, Kd)");
  check_dtype(op, "weight", weight, rows.scalar_type());
  Tensor weight_holder;
  const ExpertMatrices stored = expert_matrices_of(op, "weight", weight, weight_holder);
  const ExpertMatrices b = transpose_weight ? stored : stored.transposed();
  const Tensor dense = torch::stable::contiguous(rows);
  const Tensor segments = dense_offsets(op, offsets, rows.size(0));
  check_shape(op, "offsets", offsets, {b.num_experts + 1}, "(E_local + 1,)");
  check(b.rows == rows.size(1), "fomoe::", op, ": weight must have shape ",
        transpose_weight ? "(E_local, Kd, N)" : "(E_local, N, Kd)", " with Kd = ", rows.size(1),
        ", got ", shape_of(weight));
  Tensor out = empty_result(rows, {rows.size(0), b.cols});
  Tensor scratch = workspace_like(rows, cpu::kGemmScratchBytes);
  cpu::grouped_gemm(dense.const_data_ptr(), rows.size(0), b, values_of<int32_t>(segments),
                    aten_gemm(), out.mutable_data_ptr(), scratch.mutable_data_ptr());
  return out;
}

Tensor grouped_gemm_wgrad_cpu(const Tensor& left, const Tensor& right, const Tensor& offsets) {
  const char* op = "grouped_gemm_wgrad";
  adopt_num_threads();
  const DType dtype = float_dtype(op, "left", left);
  check_shape(op, "left", left, {-1, -1}, "(R, M)");
  check_dtype(op, "right", right, left.scalar_type());
  check_shape(op, "right", right, {left.size(0), -1}, "(R, N)");
  const Tensor segments = dense_offsets(op, offsets, left.size(0));
  const Tensor dense_left = torch::stable::contiguous(left);
  const Tensor dense_right = torch::stable::contiguous(right);
  const int64_t num_local_experts = offsets.size(0) - 1;
  Tensor out = empty_result(left, {num_local_experts, left.size(1), right.size(1)});
  Tensor scratch = workspace_like(left, cpu::kGemmScratchBytes);
  cpu::grouped_gemm_wgrad(dtype, dense_left.const_data_ptr(), dense_right.const_data_ptr(),
                          values_of<int32_t>(segments), num_local_experts, left.size(1),
                          right.size(1), aten_gemm(), out.mutable_data_ptr(),
                          scratch.mutable_data_ptr());
  return out;
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&fomoe::binding::grouped_gemm_cpu));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&fomoe::binding::grouped_gemm_wgrad_cpu));
}
