// SPDX-License-Identifier: Apache-2.0
#include "fomoe/topk_gate.h"

#include <optional>
#include <tuple>

#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "topk_gate";
constexpr const char* kBackward = "topk_gate_backward";

Gate gate_of(const char* op, const Tensor& logits, int64_t top_k, int64_t score, bool renormalize,
             double scale, bool score_after_top_k) {
  check_shape(op, "logits", logits, {-1, -1}, "(T, E)");
  const int64_t num_experts = logits.size(1);
  check(num_experts <= kMaxExperts, "fomoe::", op, ": logits must have at most ", kMaxExperts,
        " experts, got shape ", shape_of(logits));
  check(1 <= top_k && top_k <= num_experts, "fomoe::", op, ": top_k must be in [1, ", num_experts,
        "], got ", top_k);
  check(0 <= score && score <= 2, "fomoe::", op,
        ": score must be 0 (softmax), 1 (sigmoid) or 2 (unit), got ", score);
  return {logits.size(0), num_experts,      top_k, static_cast<GateScore>(score), renormalize,
          scale,          score_after_top_k};
}

void set_groups(Gate& gate, int64_t num_groups, int64_t top_k_groups, int64_t group_score) {
  check(num_groups >= 1 && gate.num_experts % num_groups == 0,
        "fomoe::topk_gate: num_groups must divide the ", gate.num_experts, " experts, got ",
        num_groups);
  check(1 <= top_k_groups && top_k_groups <= num_groups,
        "fomoe::topk_gate: top_k_groups must be in [1, ", num_groups, "], got ", top_k_groups);
  const int64_t group_size = gate.num_experts / num_groups;
  check(gate.top_k <= top_k_groups * group_size, "fomoe::topk_gate: top_k_groups must be at least ",
        (gate.top_k + group_size - 1) / group_size, " groups of ", group_size,
        " experts for top_k = ", gate.top_k, ", got ", top_k_groups);
  check(group_score == 0 || group_score == 1,
        "fomoe::topk_gate: group_score must be 0 (max) or 1 (top2_sum), got ", group_score);
  gate.num_groups = num_groups;
  gate.top_k_groups = top_k_groups;
  gate.group_score = static_cast<GroupScore>(group_score);
}

/// Checks an optional argument and makes it dense in place; nullptr if there is none.
const void* dense_data(const char* op, const char* name, OptionalTensor& tensor, ScalarType type,
                       std::initializer_list<int64_t> shape, const char* legend) {
  if (!tensor) return nullptr;
  check_dtype(op, name, *tensor, type);
  check_shape(op, name, *tensor, shape, legend);
  tensor = torch::stable::contiguous(*tensor);
  return tensor->const_data_ptr();
}

const bool* dense_mask(const char* op, OptionalTensor& resident, const Gate& gate) {
  return static_cast<const bool*>(
      dense_data(op, "resident", resident, ScalarType::Bool, {gate.num_experts}, "(E,)"));
}

/// Each id must be -1 or that of an eligible expert.
void check_ids(const Gate& gate, const int32_t* ids, const bool* resident) {
  const int64_t num_slots = gate.num_tokens * gate.top_k;
  const int64_t bad_slot = cpu::first_outside(ids, num_slots, -1, gate.num_experts);
  check(bad_slot < 0, "fomoe::", kBackward, ": ids must be in [-1, ", gate.num_experts, "), got ",
        bad_slot < 0 ? 0 : ids[bad_slot], " at slot ", bad_slot);
  for (int64_t slot = 0; slot < num_slots && resident; ++slot) {
    check(ids[slot] < 0 || resident[ids[slot]], "fomoe::", kBackward,
          ": ids must be resident experts, got ", ids[slot], " at slot ", slot);
  }
}

/// What the ops are called with besides tensors.
struct GateSettings {
  int64_t top_k;
  int64_t score;
  bool score_after_top_k;
  int64_t num_groups;
  int64_t top_k_groups;
  int64_t group_score;
  bool renormalize;
  double scale;
};

/// Checks and allocates; run(dtype, gate, input, result).
template <typename Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate(const Tensor& logits,
                                                             OptionalTensor bias,
                                                             OptionalTensor resident,
                                                             const GateSettings& settings,
                                                             Run run) {
  const DType dtype = float_dtype(kOp, "logits", logits);
  Gate gate = gate_of(kOp, logits, settings.top_k, settings.score, settings.renormalize,
                      settings.scale, settings.score_after_top_k);
  set_groups(gate, settings.num_groups, settings.top_k_groups, settings.group_score);
  const ScalarType sum_type = accumulate_type(logits.scalar_type());
  const Tensor dense = torch::stable::contiguous(logits);
  const GateInput input = {dense.const_data_ptr(),
                           dense_data(kOp, "bias", bias, sum_type, {gate.num_experts}, "(E,)"),
                           dense_mask(kOp, resident, gate)};

  using torch::stable::new_empty;
  Tensor ids = new_empty(logits, {gate.num_tokens, gate.top_k}, ScalarType::Int);
  Tensor weights = new_empty(logits, {gate.num_tokens, gate.top_k}, sum_type);
  Tensor counts = new_empty(logits, {gate.num_experts}, ScalarType::Long);
  Tensor prob_sum = new_empty(logits, {gate.num_experts}, sum_type);
  Tensor z_sum = new_empty(logits, {}, sum_type);
  run(dtype, gate, input,
      GateResult{values_of<int32_t>(ids), weights.mutable_data_ptr(), values_of<int64_t>(counts),
                 prob_sum.mutable_data_ptr(), z_sum.mutable_data_ptr()});
  return {weights, prob_sum, z_sum, ids, counts};
}

/// The gradients of the outputs that have one.
struct GateGradientTensors {
  OptionalTensor weights, prob_sum, z_sum;
};

/// Checks and allocates; run(dtype, gate, input, ids, gradient, grad_logits).
template <typename Run>
Tensor topk_gate_backward(GateGradientTensors gradients, const Tensor& logits,
                          OptionalTensor resident, const Tensor& ids, int64_t score,
                          bool score_after_top_k, bool renormalize, double scale, Run run) {
  const DType dtype = float_dtype(kBackward, "logits", logits);
  check_dtype(kBackward, "ids", ids, ScalarType::Int);
  check_shape(kBackward, "ids", ids, {-1, -1}, "(T, K)");
  const Gate gate =
      gate_of(kBackward, logits, ids.size(1), score, renormalize, scale, score_after_top_k);
  check_shape(kBackward, "ids", ids, {gate.num_tokens, gate.top_k}, "(T, K)");
  const Tensor dense = torch::stable::contiguous(logits);
  const GateInput input = {dense.const_data_ptr(), nullptr, dense_mask(kBackward, resident, gate)};
  const Tensor dense_ids = torch::stable::contiguous(ids);

  const ScalarType type = accumulate_type(logits.scalar_type());
  const GateGradient gradient = {
      dense_data(kBackward, "grad_weights", gradients.weights, type, {gate.num_tokens, gate.top_k},
                 "(T, K)"),
      dense_data(kBackward, "grad_prob_sum", gradients.prob_sum, type, {gate.num_experts}, "(E,)"),
      dense_data(kBackward, "grad_z_sum", gradients.z_sum, type, {}, "()")};
  Tensor grad_logits = torch::stable::new_empty(logits, {gate.num_tokens, gate.num_experts});
  run(dtype, gate, input, values_of<int32_t>(dense_ids), gradient, grad_logits.mutable_data_ptr());
  return grad_logits;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate_cpu(
    const Tensor& logits, OptionalTensor bias, OptionalTensor resident, int64_t top_k,
    int64_t score, bool score_after_top_k, int64_t num_groups, int64_t top_k_groups,
    int64_t group_score, bool renormalize, double scale) {
  adopt_num_threads();
  const GateSettings settings = {top_k,        score,       score_after_top_k, num_groups,
                                 top_k_groups, group_score, renormalize,       scale};
  return topk_gate(
      logits, bias, resident, settings,
      [&](DType dtype, const Gate& gate, const GateInput& input, const GateResult& result) {
        Tensor workspace = workspace_like(logits, cpu::topk_gate_workspace_bytes(dtype, gate));
        cpu::topk_gate(dtype, gate, input, result, workspace.mutable_data_ptr());
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate_cuda(
    const Tensor& logits, OptionalTensor bias, OptionalTensor resident, int64_t top_k,
    int64_t score, bool score_after_top_k, int64_t num_groups, int64_t top_k_groups,
    int64_t group_score, bool renormalize, double scale) {
  const CudaCall call(kOp, {{"logits", logits}, {"bias", bias}, {"resident", resident}});
  const GateSettings settings = {top_k,        score,       score_after_top_k, num_groups,
                                 top_k_groups, group_score, renormalize,       scale};
  return topk_gate(
      logits, bias, resident, settings,
      [&](DType dtype, const Gate& gate, const GateInput& input, const GateResult& result) {
        if constexpr (kHasCudaKernels) {
          Tensor workspace = workspace_like(logits, cuda::topk_gate_workspace_bytes(dtype, gate));
          cuda::topk_gate(dtype, gate, input, result, workspace.mutable_data_ptr(), call.stream());
        }
      });
}

Tensor topk_gate_backward_cpu(OptionalTensor grad_weights, OptionalTensor grad_prob_sum,
                              OptionalTensor grad_z_sum, const Tensor& logits,
                              OptionalTensor resident, const Tensor& ids, int64_t score,
                              bool score_after_top_k, bool renormalize, double scale) {
  adopt_num_threads();
  return topk_gate_backward({grad_weights, grad_prob_sum, grad_z_sum}, logits, resident, ids, score,
                            score_after_top_k, renormalize, scale,
                            [](DType dtype, const Gate& gate, const GateInput& input,
                               const int32_t* chosen, auto... rest) {
                              check_ids(gate, chosen, input.resident);
                              cpu::topk_gate_backward(dtype, gate, input, chosen, rest...);
                            });
}

Tensor topk_gate_backward_cuda(OptionalTensor grad_weights, OptionalTensor grad_prob_sum,
                               OptionalTensor grad_z_sum, const Tensor& logits,
                               OptionalTensor resident, const Tensor& ids, int64_t score,
                               bool score_after_top_k, bool renormalize, double scale) {
  const CudaCall call(kBackward, {{"logits", logits},
                                  {"resident", resident},
                                  {"ids", ids},
                                  {"grad_weights", grad_weights},
                                  {"grad_prob_sum", grad_prob_sum},
                                  {"grad_z_sum", grad_z_sum}});
  return topk_gate_backward(
      {grad_weights, grad_prob_sum, grad_z_sum}, logits, resident, ids, score, score_after_top_k,
      renormalize, scale, [&](DType dtype, const Gate& gate, auto... rest) {
        if constexpr (kHasCudaKernels) {
          Tensor workspace =
              workspace_like(logits, cuda::topk_gate_backward_workspace_bytes(dtype, gate));
          cuda::topk_gate_backward(dtype, gate, rest..., workspace.mutable_data_ptr(),
                                   call.stream());
        }
      });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&fomoe::binding::topk_gate_cpu));
  m.impl("topk_gate_backward", TORCH_BOX(&fomoe::binding::topk_gate_backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("topk_gate", TORCH_BOX(&fomoe::binding::topk_gate_cuda));
  m.impl("topk_gate_backward", TORCH_BOX(&fomoe::binding::topk_gate_backward_cuda));
}
