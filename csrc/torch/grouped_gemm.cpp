// SPDX-License-Identifier: Apache-2.0
#include "fomoe/grouped_gemm.h"

#include "aten_gemm.h"
#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

constexpr const char* kOp = "grouped_gemm";
constexpr const char* kWgrad = "grouped_gemm_wgrad";

/// Checks the offsets and makes them dense.
Tensor dense_offsets(const char* op, const Tensor& offsets) {
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check(offsets.dim() == 1 && offsets.size(0) >= 1, "fomoe::", op,
        ": offsets must have shape (E_local + 1,), got ", shape_of(offsets));
  return torch::stable::contiguous(offsets);
}

/// Reads the offsets: on the CPU only.
void check_values(const char* op, const int32_t* offsets, int64_t num_local_experts,
                  int64_t num_rows) {
  const char* defect = cpu::defect_of_offsets(offsets, num_local_experts, num_rows);
  check(!defect, "fomoe::", op, ": ", defect ? defect : "", "; there are ", num_rows, " rows");
}

/// Checks and allocates; run(rows, num_rows, b, offsets, out).
template <typename Run>
Tensor grouped_gemm(const Tensor& rows, const Tensor& weight, const Tensor& offsets,
                    bool transpose_weight, Run run) {
  float_dtype(kOp, "rows", rows);
  check_shape(kOp, "rows", rows, {-1, -1}, "(R, Kd)");
  check_dtype(kOp, "weight", weight, rows.scalar_type());
  Tensor weight_holder;
  const ExpertMatrices stored = expert_matrices_of(kOp, "weight", weight, weight_holder);
  const ExpertMatrices b = transpose_weight ? stored : stored.transposed();
  const Tensor dense = torch::stable::contiguous(rows);
  const Tensor segments = dense_offsets(kOp, offsets);
  check_shape(kOp, "offsets", offsets, {b.num_experts + 1}, "(E_local + 1,)");
  check(b.rows == rows.size(1), "fomoe::", kOp, ": weight must have shape ",
        transpose_weight ? "(E_local, Kd, N)" : "(E_local, N, Kd)", " with Kd = ", rows.size(1),
        ", got ", shape_of(weight));
  Tensor out = empty_result(rows, {rows.size(0), b.cols});
  run(dense.const_data_ptr(), rows.size(0), b, values_of<int32_t>(segments),
      out.mutable_data_ptr());
  return out;
}

/// The operands of grouped_gemm_wgrad, checked and dense.
struct WgradArgs {
  DType dtype;
  const void* left;
  const void* right;
  int64_t num_rows;
  const int32_t* offsets;
  int64_t num_local_experts;
  int64_t out_rows;
  int64_t out_cols;
};

/// Checks and allocates; run(args, out).
template <typename Run>
Tensor grouped_gemm_wgrad(const Tensor& left, const Tensor& right, const Tensor& offsets, Run run) {
  const DType dtype = float_dtype(kWgrad, "left", left);
  check_shape(kWgrad, "left", left, {-1, -1}, "(R, M)");
  check_dtype(kWgrad, "right", right, left.scalar_type());
  check_shape(kWgrad, "right", right, {left.size(0), -1}, "(R, N)");
  const Tensor segments = dense_offsets(kWgrad, offsets);
  const Tensor dense_left = torch::stable::contiguous(left);
  const Tensor dense_right = torch::stable::contiguous(right);
  const WgradArgs args = {dtype,
                          dense_left.const_data_ptr(),
                          dense_right.const_data_ptr(),
                          left.size(0),
                          values_of<int32_t>(segments),
                          offsets.size(0) - 1,
                          left.size(1),
                          right.size(1)};
  Tensor out = empty_result(left, {args.num_local_experts, args.out_rows, args.out_cols});
  run(args, out.mutable_data_ptr());
  return out;
}

}  // namespace

Tensor grouped_gemm_cpu(const Tensor& rows, const Tensor& weight, const Tensor& offsets,
                        bool transpose_weight) {
  adopt_num_threads();
  return grouped_gemm(rows, weight, offsets, transpose_weight,
                      [&](const void* data, int64_t num_rows, const ExpertMatrices& b,
                          const int32_t* segments, void* out) {
                        check_values(kOp, segments, b.num_experts, num_rows);
                        Tensor scratch = workspace_like(rows, cpu::kGemmScratchBytes);
                        cpu::grouped_gemm(data, num_rows, b, segments, aten_gemm(), out,
                                          scratch.mutable_data_ptr());
                      });
}

Tensor grouped_gemm_cuda(const Tensor& rows, const Tensor& weight, const Tensor& offsets,
                         bool transpose_weight) {
  const CudaCall call(kOp, {{"rows", rows}, {"weight", weight}, {"offsets", offsets}});
  return grouped_gemm(
      rows, weight, offsets, transpose_weight,
      [&](const void* data, int64_t num_rows, const ExpertMatrices& b, const int32_t* segments,
          void* out) {
        if constexpr (kHasCudaKernels) {
          const KernelPath path = call.path(
              {b.dtype, {data, b.data, out}, {b.rows, b.cols, leading_stride(b), b.expert_stride}});
          Tensor workspace =
              workspace_like(rows, cuda::grouped_gemm_workspace_bytes(num_rows, b.num_experts));
          cuda::grouped_gemm(path, data, num_rows, b, segments, out, workspace.mutable_data_ptr(),
                             call.stream());
        }
      });
}

Tensor grouped_gemm_wgrad_cpu(const Tensor& left, const Tensor& right, const Tensor& offsets) {
  adopt_num_threads();
  return grouped_gemm_wgrad(left, right, offsets, [&](const WgradArgs& args, void* out) {
    check_values(kWgrad, args.offsets, args.num_local_experts, args.num_rows);
    Tensor scratch = workspace_like(left, cpu::kGemmScratchBytes);
    cpu::grouped_gemm_wgrad(args.dtype, args.left, args.right, args.offsets, args.num_local_experts,
                            args.out_rows, args.out_cols, aten_gemm(), out,
                            scratch.mutable_data_ptr());
  });
}

Tensor grouped_gemm_wgrad_cuda(const Tensor& left, const Tensor& right, const Tensor& offsets) {
  const CudaCall call(kWgrad, {{"left", left}, {"right", right}, {"offsets", offsets}});
  return grouped_gemm_wgrad(left, right, offsets, [&](const WgradArgs& args, void* out) {
    if constexpr (kHasCudaKernels) {
      const KernelPath path =
          call.path({args.dtype, {args.left, args.right, out}, {args.out_rows, args.out_cols}});
      cuda::grouped_gemm_wgrad(path, args.dtype, args.left, args.right, args.num_rows, args.offsets,
                               args.num_local_experts, args.out_rows, args.out_cols, out,
                               call.stream());
    }
  });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&fomoe::binding::grouped_gemm_cpu));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&fomoe::binding::grouped_gemm_wgrad_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("grouped_gemm", TORCH_BOX(&fomoe::binding::grouped_gemm_cuda));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&fomoe::binding::grouped_gemm_wgrad_cuda));
}
