// SPDX-License-Identifier: Apache-2.0
// The schemas of torch.ops.fomoe, all in one place; each op's file registers its implementation.
// None has a str: the stable ABI leaks the string of every call. Choices are codes of enums.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fomoe, m) {
  m.def(
      "topk_gate(Tensor logits, Tensor? bias, Tensor? resident, int top_k, int score, "
      "bool score_after_top_k, int num_groups, int top_k_groups, int group_score, "
      "bool renormalize, float scale) "
      "-> (Tensor weights, Tensor prob_sum, Tensor z_sum, Tensor ids, Tensor counts)");
  m.def(
      "topk_gate_backward(Tensor? grad_weights, Tensor? grad_prob_sum, Tensor? grad_z_sum, "
      "Tensor logits, Tensor? resident, Tensor ids, int score, bool score_after_top_k, "
      "bool renormalize, float scale) -> Tensor");

  m.def(
      "route(Tensor ids, Tensor expert_map, int num_local_experts, SymInt? capacity) "
      "-> (Tensor slot_to_row, Tensor row_to_slot, Tensor offsets)");

  m.def("destinations(Tensor ids, Tensor group_of_expert, int num_groups) -> Tensor");

  m.def("permute(Tensor x, Tensor slot_to_row, Tensor row_to_slot, Tensor offsets) -> Tensor");

  m.def(
      "combine(Tensor rows, Tensor? weights, Tensor slot_to_row, Tensor row_to_slot, "
      "Tensor offsets) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_y, Tensor rows, Tensor weights, Tensor slot_to_row, "
      "Tensor row_to_slot, Tensor offsets) -> (Tensor d_rows, Tensor d_weights)");

  m.def(
      "grouped_gemm(Tensor rows, Tensor weight, Tensor offsets, bool transpose_weight) -> Tensor");
  m.def("grouped_gemm_wgrad(Tensor left, Tensor right, Tensor offsets) -> Tensor");

  m.def(
      "expert_mlp(Tensor x, Tensor weights, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, "
      "Tensor slot_to_row, Tensor row_to_slot, Tensor offsets, int activation, "
      "bool keep_pre_activation) -> (Tensor y, Tensor pre_activation)");
  m.def(
      "expert_mlp_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor w1, Tensor w2, "
      "Tensor? b1, Tensor? b2, Tensor pre_activation, Tensor slot_to_row, Tensor row_to_slot, "
      "Tensor offsets, int activation, bool needs_x, bool needs_experts) "
      "-> (Tensor d_x, Tensor d_weights, Tensor d_w1, Tensor d_w2, Tensor d_b1, Tensor d_b2)");
}
