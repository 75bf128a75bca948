// SPDX-License-Identifier: Apache-2.0
#include "fomoe/expert_mlp.h"

#include <optional>
#include <tuple>

#include "aten_gemm.h"
#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kOp = "expert_mlp";
constexpr const char* kBackward = "expert_mlp_backward";

/// The arguments that the forward and the backward share, checked and dense.
struct ExpertMlpArgs {
  ExpertMlpArgs(const char* op, const Tensor& x, const Tensor& weights, const Tensor& w1,
                const Tensor& w2, const OptionalTensor& b1, const OptionalTensor& b2,
                const Tensor& slot_to_row, const Tensor& row_to_slot, const Tensor& offsets,
                int64_t activation) {
    check(0 <= activation && activation <= 2, "fomoe::", op,
          ": activation must be 0 (swiglu), 1 (silu) or 2 (swiglu_clamped), got ", activation);
    mlp.activation = static_cast<Activation>(activation);
    float_dtype(op, "x", x);
    check_dtype(op, "weights", weights, accumulate_type(x.scalar_type()));
    check_dtype(op, "w1", w1, x.scalar_type());
    check_dtype(op, "w2", w2, x.scalar_type());
    const bool gated = is_gated(mlp.activation);
    mlp.routing = routing_of(op, slot_to_row, row_to_slot, offsets, routing_holder);
    mlp.w1 = expert_matrices_of(op, "w1", w1, w1_holder);
    mlp.w2 = expert_matrices_of(op, "w2", w2, w2_holder);

    const int64_t num_experts = mlp.routing.num_local_experts;
    check_shape(op, "x", x, {mlp.routing.num_tokens, -1}, "(T, D)");
    check_shape(op, "weights", weights, {mlp.routing.num_tokens, mlp.routing.top_k}, "(T, K)");
    check_shape(op, "w2", w2, {num_experts, x.size(1), -1}, "(E_local, D, F)");
    check_shape(op, "w1", w1, {num_experts, mlp.expert_dim() * (gated ? 2 : 1), x.size(1)},
                gated ? "(E_local, 2*F, D)" : "(E_local, F, D)");
    check(mlp.dim() > 0 && mlp.expert_dim() > 0, "fomoe::", op,
          ": D and F must be at least 1, got w2 of shape ", shape_of(w2));
    mlp.b1 = bias_of(op, "b1", b1, x, mlp.pre_dim(), gated ? "(E_local, 2*F)" : "(E_local, F)",
                     b1_holder);
    mlp.b2 = bias_of(op, "b2", b2, x, mlp.dim(), "(E_local, D)", b2_holder);
    dense_x = torch::stable::contiguous(x);
    dense_weights = torch::stable::contiguous(weights);
  }

  const void* bias_of(const char* op, const char* name, const OptionalTensor& bias, const Tensor& x,
                      int64_t width, const char* legend, Tensor& holder) const {
    if (!bias) return nullptr;
    check_dtype(op, name, *bias, x.scalar_type());
    check_shape(op, name, *bias, {mlp.routing.num_local_experts, width}, legend);
    holder = torch::stable::contiguous(*bias);
    return holder.const_data_ptr();
  }

  ExpertMlp mlp;
  Tensor dense_x, dense_weights;
  RoutingTensors routing_holder;
  Tensor w1_holder, w2_holder, b1_holder, b2_holder;
};

/// The matrix kernels for the products of the layer with two more arrays that they access.
KernelPath path_of(const CudaCall& call, const ExpertMlpArgs& args, const void* first,
                   const void* second) {
  const ExpertMlp& mlp = args.mlp;
  return call.path(
      {mlp.dtype(),
       {args.dense_x.const_data_ptr(), mlp.w1.data, mlp.w2.data, mlp.b1, mlp.b2, first, second},
       {mlp.dim(), mlp.expert_dim(), mlp.pre_dim(), leading_stride(mlp.w1), mlp.w1.expert_stride,
        leading_stride(mlp.w2), mlp.w2.expert_stride}});
}

/// Allocates; run(x, weights, y, pre).
template <typename Run>
std::tuple<Tensor, Tensor> expert_mlp(const ExpertMlpArgs& args, bool keep_pre_activation,
                                      Run run) {
  const ExpertMlp& mlp = args.mlp;
  const Tensor& x = args.dense_x;
  Tensor y = empty_result(x, {mlp.routing.num_tokens, mlp.dim()});
  Tensor pre_activation =
      empty_result(x, {keep_pre_activation ? mlp.routing.num_rows() : 0, mlp.pre_dim()});
  run(x.const_data_ptr(), args.dense_weights.const_data_ptr(), y.mutable_data_ptr(),
      keep_pre_activation ? pre_activation.mutable_data_ptr() : nullptr);
  return {y, pre_activation};
}

/// Checks and allocates; run(grad_y, x, weights, pre, gradient).
template <typename Run>
Gradients expert_mlp_backward(const ExpertMlpArgs& args, const Tensor& grad_y,
                              const Tensor& pre_activation, bool needs_x, bool needs_experts,
                              Run run) {
  const ExpertMlp& mlp = args.mlp;
  const Tensor& x = args.dense_x;
  const int64_t num_experts = mlp.routing.num_local_experts;
  check_dtype(kBackward, "grad_y", grad_y, x.scalar_type());
  check_shape(kBackward, "grad_y", grad_y, {mlp.routing.num_tokens, mlp.dim()}, "(T, D)");
  check_dtype(kBackward, "pre_activation", pre_activation, x.scalar_type());
  check_shape(kBackward, "pre_activation", pre_activation, {mlp.routing.num_rows(), mlp.pre_dim()},
              "(T*K, rows of w1)");
  const Tensor dense_grad = torch::stable::contiguous(grad_y);
  const Tensor dense_pre = torch::stable::contiguous(pre_activation);

  // A gradient that is not wanted has no elements.
  const bool needs_b1 = needs_experts && mlp.b1, needs_b2 = needs_experts && mlp.b2;
  Tensor d_x = empty_result(x, {needs_x ? mlp.routing.num_tokens : 0, mlp.dim()});
  Tensor d_weights = empty_result(args.dense_weights, {mlp.routing.num_tokens, mlp.routing.top_k});
  Tensor d_w1 = empty_result(x, {needs_experts ? num_experts : 0, mlp.w1.rows, mlp.w1.cols});
  Tensor d_w2 = empty_result(x, {needs_experts ? num_experts : 0, mlp.w2.rows, mlp.w2.cols});
  Tensor d_b1 = empty_result(x, {needs_b1 ? num_experts : 0, mlp.pre_dim()});
  Tensor d_b2 = empty_result(x, {needs_b2 ? num_experts : 0, mlp.dim()});
  const auto target = [](bool is_needed, Tensor& tensor) {
    return is_needed ? tensor.mutable_data_ptr() : nullptr;
  };
  const ExpertMlpGradient gradient = {target(needs_x, d_x),        d_weights.mutable_data_ptr(),
                                      target(needs_experts, d_w1), target(needs_experts, d_w2),
                                      target(needs_b1, d_b1),      target(needs_b2, d_b2)};
  run(dense_grad.const_data_ptr(), x.const_data_ptr(), args.dense_weights.const_data_ptr(),
      dense_pre.const_data_ptr(), gradient);
  return {d_x, d_weights, d_w1, d_w2, d_b1, d_b2};
}

}  // namespace

std::tuple<Tensor, Tensor> expert_mlp_cpu(const Tensor& x, const Tensor& weights, const Tensor& w1,
                                          const Tensor& w2, OptionalTensor b1, OptionalTensor b2,
                                          const Tensor& slot_to_row, const Tensor& row_to_slot,
                                          const Tensor& offsets, int64_t activation,
                                          bool keep_pre_activation) {
  adopt_num_threads();
  const ExpertMlpArgs args(kOp, x, weights, w1, w2, b1, b2, slot_to_row, row_to_slot, offsets,
                           activation);
  check_values(kOp, args.mlp.routing);
  return expert_mlp(
      args, keep_pre_activation, [&](const void* tokens, const void* factors, void* y, void* pre) {
        Tensor workspace = workspace_like(x, cpu::expert_mlp_workspace_bytes(args.mlp));
        cpu::expert_mlp(args.mlp, tokens, factors, aten_gemm(), y, pre,
                        workspace.mutable_data_ptr());
      });
}

std::tuple<Tensor, Tensor> expert_mlp_cuda(const Tensor& x, const Tensor& weights, const Tensor& w1,
                                           const Tensor& w2, OptionalTensor b1, OptionalTensor b2,
                                           const Tensor& slot_to_row, const Tensor& row_to_slot,
                                           const Tensor& offsets, int64_t activation,
                                           bool keep_pre_activation) {
  const CudaCall call(kOp, {{"x", x},
                            {"weights", weights},
                            {"w1", w1},
                            {"w2", w2},
                            {"b1", b1},
                            {"b2", b2},
                            {"slot_to_row", slot_to_row},
                            {"row_to_slot", row_to_slot},
                            {"offsets", offsets}});
  const ExpertMlpArgs args(kOp, x, weights, w1, w2, b1, b2, slot_to_row, row_to_slot, offsets,
                           activation);
  return expert_mlp(
      args, keep_pre_activation, [&](const void* tokens, const void* factors, void* y, void* pre) {
        if constexpr (kHasCudaKernels) {
          const KernelPath path = path_of(call, args, y, pre);
          Tensor workspace = workspace_like(x, cuda::expert_mlp_workspace_bytes(path, args.mlp));
          cuda::expert_mlp(path, args.mlp, tokens, factors, y, pre, workspace.mutable_data_ptr(),
                           call.stream());
        }
      });
}

Gradients expert_mlp_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& weights,
                                  const Tensor& w1, const Tensor& w2, OptionalTensor b1,
                                  OptionalTensor b2, const Tensor& pre_activation,
                                  const Tensor& slot_to_row, const Tensor& row_to_slot,
                                  const Tensor& offsets, int64_t activation, bool needs_x,
                                  bool needs_experts) {
  adopt_num_threads();
  const ExpertMlpArgs args(kBackward, x, weights, w1, w2, b1, b2, slot_to_row, row_to_slot, offsets,
                           activation);
  check_values(kBackward, args.mlp.routing);
  return expert_mlp_backward(
      args, grad_y, pre_activation, needs_x, needs_experts,
      [&](const void* grad, const void* tokens, const void* factors, const void* pre,
          const ExpertMlpGradient& gradient) {
        Tensor workspace = workspace_like(x, cpu::expert_mlp_backward_workspace_bytes(args.mlp));
        cpu::expert_mlp_backward(args.mlp, grad, tokens, factors, pre, aten_gemm(), gradient,
                                 workspace.mutable_data_ptr());
      });
}

Gradients expert_mlp_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& weights,
                                   const Tensor& w1, const Tensor& w2, OptionalTensor b1,
                                   OptionalTensor b2, const Tensor& pre_activation,
                                   const Tensor& slot_to_row, const Tensor& row_to_slot,
                                   const Tensor& offsets, int64_t activation, bool needs_x,
                                   bool needs_experts) {
  const CudaCall call(kBackward, {{"x", x},
                                  {"weights", weights},
                                  {"w1", w1},
                                  {"w2", w2},
                                  {"b1", b1},
                                  {"b2", b2},
                                  {"grad_y", grad_y},
                                  {"pre_activation", pre_activation},
                                  {"slot_to_row", slot_to_row},
                                  {"row_to_slot", row_to_slot},
                                  {"offsets", offsets}});
  const ExpertMlpArgs args(kBackward, x, weights, w1, w2, b1, b2, slot_to_row, row_to_slot, offsets,
                           activation);
  return expert_mlp_backward(
      args, grad_y, pre_activation, needs_x, needs_experts,
      [&](const void* grad, const void* tokens, const void* factors, const void* pre,
          const ExpertMlpGradient& gradient) {
        if constexpr (kHasCudaKernels) {
          const KernelPath path = path_of(call, args, grad, pre);
          Tensor workspace =
              workspace_like(x, cuda::expert_mlp_backward_workspace_bytes(path, args.mlp));
          cuda::expert_mlp_backward(path, args.mlp, grad, tokens, factors, pre, gradient,
                                    workspace.mutable_data_ptr(), call.stream());
        }
      });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&fomoe::binding::expert_mlp_cpu));
  m.impl("expert_mlp_backward", TORCH_BOX(&fomoe::binding::expert_mlp_backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("expert_mlp", TORCH_BOX(&fomoe::binding::expert_mlp_cuda));
  m.impl("expert_mlp_backward", TORCH_BOX(&fomoe::binding::expert_mlp_backward_cuda));
}
