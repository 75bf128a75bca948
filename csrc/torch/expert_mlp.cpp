// SPDX-License-Identifier: Apache-2.0
#include "fomoe/expert_mlp.h"

#include <optional>
#include <tuple>

#include "aten_gemm.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

/// The arguments that the forward and the backward share, checked and dense.
struct ExpertMlpArgs {
  ExpertMlpArgs(const char* op, const Tensor& x, const Tensor& weights, const Tensor& w1,
                const Tensor& w2, const std::optional<Tensor>& b1, const std::optional<Tensor>& b2,
                const Tensor& slot_to_row, const Tensor& row_to_slot, const Tensor& offsets,
                int64_t activation) {
    adopt_num_threads();
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

  const void* bias_of(const char* op, const char* name, const std::optional<Tensor>& bias,
                      const Tensor& x, int64_t width, const char* legend, Tensor& holder) const {
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

}  // namespace

std::tuple<Tensor, Tensor> expert_mlp_cpu(const Tensor& x, const Tensor& weights, const Tensor& w1,
                                          const Tensor& w2, std::optional<Tensor> b1,
                                          std::optional<Tensor> b2, const Tensor& slot_to_row,
                                          const Tensor& row_to_slot, const Tensor& offsets,
                                          int64_t activation, bool keep_pre_activation) {
  const ExpertMlpArgs args("expert_mlp", x, weights, w1, w2, b1, b2, slot_to_row, row_to_slot,
                           offsets, activation);
  const ExpertMlp& mlp = args.mlp;
  Tensor y = empty_result(x, {mlp.routing.num_tokens, mlp.dim()});
  Tensor pre_activation =
      empty_result(x, {keep_pre_activation ? mlp.routing.num_rows() : 0, mlp.pre_dim()});
  Tensor workspace = workspace_like(x, cpu::expert_mlp_workspace_bytes(mlp));
  cpu::expert_mlp(mlp, args.dense_x.const_data_ptr(), args.dense_weights.const_data_ptr(),
                  aten_gemm(), y.mutable_data_ptr(),
                  keep_pre_activation ? pre_activation.mutable_data_ptr() : nullptr,
                  workspace.mutable_data_ptr());
  return {y, pre_activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_cpu(
    const Tensor& grad_y, const Tensor& x, const Tensor& weights, const Tensor& w1,
    const Tensor& w2, std::optional<Tensor> b1, std::optional<Tensor> b2,
    const Tensor& pre_activation, const Tensor& slot_to_row, const Tensor& row_to_slot,
    const Tensor& offsets, int64_t activation, bool needs_x, bool needs_experts) {
  const char* op = "expert_mlp_backward";
  const ExpertMlpArgs args(op, x, weights, w1, w2, b1, b2, slot_to_row, row_to_slot, offsets,
                           activation);
  const ExpertMlp& mlp = args.mlp;
  const int64_t num_experts = mlp.routing.num_local_experts;
  check_dtype(op, "grad_y", grad_y, x.scalar_type());
  check_shape(op, "grad_y", grad_y, {mlp.routing.num_tokens, mlp.dim()}, "(T, D)");
  check_dtype(op, "pre_activation", pre_activation, x.scalar_type());
  check_shape(op, "pre_activation", pre_activation, {mlp.routing.num_rows(), mlp.pre_dim()},
              "(T*K, rows of w1)");
  const Tensor dense_grad = torch::stable::contiguous(grad_y);
  const Tensor dense_pre = torch::stable::contiguous(pre_activation);

  // A gradient that is not wanted has no elements.
  const bool needs_b1 = needs_experts && b1, needs_b2 = needs_experts && b2;
  Tensor d_x = empty_result(x, {needs_x ? mlp.routing.num_tokens : 0, mlp.dim()});
  Tensor d_weights = empty_result(weights, {mlp.routing.num_tokens, mlp.routing.top_k});
  Tensor d_w1 = empty_result(w1, {needs_experts ? num_experts : 0, mlp.w1.rows, mlp.w1.cols});
  Tensor d_w2 = empty_result(w2, {needs_experts ? num_experts : 0, mlp.w2.rows, mlp.w2.cols});
  Tensor d_b1 = empty_result(x, {needs_b1 ? num_experts : 0, mlp.pre_dim()});
  Tensor d_b2 = empty_result(x, {needs_b2 ? num_experts : 0, mlp.dim()});
  Tensor workspace = workspace_like(x, cpu::expert_mlp_backward_workspace_bytes(mlp));
  const auto target = [](bool is_needed, Tensor& tensor) {
    return is_needed ? tensor.mutable_data_ptr() : nullptr;
  };
  const ExpertMlpGradient gradient = {target(needs_x, d_x),        d_weights.mutable_data_ptr(),
                                      target(needs_experts, d_w1), target(needs_experts, d_w2),
                                      target(needs_b1, d_b1),      target(needs_b2, d_b2)};
  cpu::expert_mlp_backward(mlp, dense_grad.const_data_ptr(), args.dense_x.const_data_ptr(),
                           args.dense_weights.const_data_ptr(), dense_pre.const_data_ptr(),
                           aten_gemm(), gradient, workspace.mutable_data_ptr());
  return {d_x, d_weights, d_w1, d_w2, d_b1, d_b2};
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&fomoe::binding::expert_mlp_cpu));
  m.impl("expert_mlp_backward", TORCH_BOX(&fomoe::binding::expert_mlp_backward_cpu));
}
