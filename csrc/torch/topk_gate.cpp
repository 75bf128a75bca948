// SPDX-License-Identifier: Apache-2.0
#include "fomoe/topk_gate.h"

#include <optional>
#include <tuple>

#include "tensor_args.h"

namespace fomoe::binding {
namespace {

Gate gate_of(const char* op, const Tensor& logits, int64_t top_k, int64_t score, bool renormalize,
             double scale) {
  check_shape(op, "logits", logits, {-1, -1}, "(T, E)");
  const int64_t num_experts = logits.size(1);
  check(num_experts <= kMaxExperts, "fomoe::", op, ": logits must have at most ", kMaxExperts,
        " experts, got shape ", shape_of(logits));
  check(1 <= top_k && top_k <= num_experts, "fomoe::", op, ": top_k must be in [1, ", num_experts,
        "], got ", top_k);
  check(score == 0 || score == 1, "fomoe::", op, ": score must be 0 (softmax) or 1 (sigmoid), got ",
        score);
  return {logits.size(0), num_experts, top_k, static_cast<GateScore>(score), renormalize, scale};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate_cpu(const Tensor& logits,
                                                                 int64_t top_k, int64_t score,
                                                                 bool renormalize, double scale) {
  adopt_num_threads();
  const DType dtype = float_dtype("topk_gate", "logits", logits);
  const Gate gate = gate_of("topk_gate", logits, top_k, score, renormalize, scale);
  const ScalarType sum_type = accumulate_type(logits.scalar_type());
  const Tensor dense = torch::stable::contiguous(logits);

  using torch::stable::new_empty;
  Tensor ids = new_empty(logits, {gate.num_tokens, top_k}, ScalarType::Int);
  Tensor weights = new_empty(logits, {gate.num_tokens, top_k}, sum_type);
  Tensor counts = new_empty(logits, {gate.num_experts}, ScalarType::Long);
  Tensor prob_sum = new_empty(logits, {gate.num_experts}, sum_type);
  Tensor z_sum = new_empty(logits, {}, sum_type);
  Tensor workspace = workspace_like(logits, cpu::topk_gate_workspace_bytes(dtype, gate));
  const GateResult result = {values_of<int32_t>(ids), weights.mutable_data_ptr(),
                             values_of<int64_t>(counts), prob_sum.mutable_data_ptr(),
                             z_sum.mutable_data_ptr()};
  cpu::topk_gate(dtype, gate, dense.const_data_ptr(), result, workspace.mutable_data_ptr());
  return {weights, prob_sum, z_sum, ids, counts};
}

Tensor topk_gate_backward_cpu(std::optional<Tensor> grad_weights,
                              std::optional<Tensor> grad_prob_sum, std::optional<Tensor> grad_z_sum,
                              const Tensor& logits, const Tensor& ids, int64_t score,
                              bool renormalize, double scale) {
  const char* op = "topk_gate_backward";
  adopt_num_threads();
  const DType dtype = float_dtype(op, "logits", logits);
  check_dtype(op, "ids", ids, ScalarType::Int);
  check_shape(op, "ids", ids, {-1, -1}, "(T, K)");
  const Gate gate = gate_of(op, logits, ids.size(1), score, renormalize, scale);
  check_shape(op, "ids", ids, {gate.num_tokens, gate.top_k}, "(T, K)");
  const Tensor dense_ids = torch::stable::contiguous(ids);
  const auto* id = values_of<int32_t>(dense_ids);
  const int64_t bad_slot =
      cpu::first_outside(id, gate.num_tokens * gate.top_k, 0, gate.num_experts);
  check(bad_slot < 0, "fomoe::", op, ": ids must be in [0, ", gate.num_experts, "), got ",
        bad_slot < 0 ? 0 : id[bad_slot], " at slot ", bad_slot);

  // Checks a gradient and makes it dense; undefined ones are left out.
  const auto dense_gradient = [&](std::optional<Tensor>& gradient, const char* name,
                                  std::initializer_list<int64_t> shape, const char* legend) {
    if (!gradient) return static_cast<const void*>(nullptr);
    check_dtype(op, name, *gradient, accumulate_type(logits.scalar_type()));
    check_shape(op, name, *gradient, shape, legend);
    gradient = torch::stable::contiguous(*gradient);
    return static_cast<const void*>(gradient->const_data_ptr());
  };
  const GateGradient gradient = {
      dense_gradient(grad_weights, "grad_weights", {gate.num_tokens, gate.top_k}, "(T, K)"),
      dense_gradient(grad_prob_sum, "grad_prob_sum", {gate.num_experts}, "(E,)"),
      dense_gradient(grad_z_sum, "grad_z_sum", {}, "()")};
  const Tensor dense = torch::stable::contiguous(logits);
  Tensor grad_logits = torch::stable::new_empty(logits, {gate.num_tokens, gate.num_experts});
  cpu::topk_gate_backward(dtype, gate, dense.const_data_ptr(), id, gradient,
                          grad_logits.mutable_data_ptr());
  return grad_logits;
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&fomoe::binding::topk_gate_cpu));
  m.impl("topk_gate_backward", TORCH_BOX(&fomoe::binding::topk_gate_backward_cpu));
}
