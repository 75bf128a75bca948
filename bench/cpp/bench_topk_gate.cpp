// SPDX-License-Identifier: Apache-2.0
#include "fomoe/topk_gate.h"

#include <vector>

#include "measure.h"

namespace {

using bench::Memory;
using fomoe::DType;

/// Everything the gate reads and writes; sums are of the accumulation type.
struct Arrays {
  Arrays(bench::Device& device, DType dtype, const fomoe::Gate& gate)
      : sum(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
        logits(bench::random_array(device, dtype, gate.num_tokens * gate.num_experts)),
        ids(device, slots(gate) * 4),
        weights(bench::random_array(device, sum, slots(gate))),
        counts(device, gate.num_experts * 8),
        prob_sum(bench::random_array(device, sum, gate.num_experts)),
        z_sum(bench::random_array(device, sum, 1)),
        grad_weights(bench::random_array(device, sum, slots(gate))),
        grad_logits(device, logits.bytes()) {}

  static int64_t slots(const fomoe::Gate& gate) { return gate.num_tokens * gate.top_k; }

  bench::GateArrays view() const {
    bench::GateArrays view = {};
    view.input.logits = logits.data();
    view.result = {static_cast<int32_t*>(ids.data()), weights.data(),
                   static_cast<int64_t*>(counts.data()), prob_sum.data(), z_sum.data()};
    view.gradient = {grad_weights.data(), prob_sum.data(), z_sum.data()};
    view.grad_logits = grad_logits.data();
    return view;
  }

  DType sum;
  Memory logits, ids, weights, counts, prob_sum, z_sum, grad_weights, grad_logits;
};

void measure_shape(bench::Session& session, const bench::Shape& shape, DType dtype) {
  fomoe::Gate gate = {shape.tokens, shape.num_experts, shape.top_k, shape.score, true, shape.scale};
  gate.num_groups = shape.num_groups;
  gate.top_k_groups = shape.top_k_groups;
  if (shape.num_groups > 1) gate.group_score = fomoe::GroupScore::kTop2Sum;
  const int64_t logit_bytes = shape.tokens * shape.num_experts * fomoe::size_of(dtype);
  const int64_t slot_bytes = 8 * shape.num_rows();
  const int num_sets = session.num_sets(2 * logit_bytes + slot_bytes);
  std::vector<Arrays> arrays;
  std::vector<bench::GateArrays> sets;
  arrays.reserve(static_cast<size_t>(num_sets));
  for (int set = 0; set < num_sets; ++set) {
    arrays.emplace_back(session.device(), dtype, gate);
    sets.push_back(arrays.back().view());
  }
  const bench::Work forward = session.ops().topk_gate(dtype, gate, sets);
  for (int set = 0; set < num_sets; ++set) forward(set);  // ids for the backward
  if (session.wants("forward")) {
    session.measure({session.labels("topk_gate", shape, bench::name_of(dtype)),
                     dtype,
                     forward,
                     num_sets,
                     static_cast<double>(logit_bytes + slot_bytes),
                     0,
                     {}});
  }
  if (session.wants("backward")) {
    session.measure({session.labels("topk_gate_backward", shape, bench::name_of(dtype)),
                     dtype,
                     session.ops().topk_gate_backward(dtype, gate, sets),
                     num_sets,
                     static_cast<double>(2 * logit_bytes + slot_bytes),
                     0,
                     {}});
  }
}

void measure(const bench::Program& program, const bench::Arguments& arguments) {
  bench::Session session(program, arguments);
  for (const bench::Shape& shape : arguments.shapes) {
    for (const DType dtype : arguments.dtypes) measure_shape(session, shape, dtype);
  }
}

}  // namespace

int main(int count, char** texts) {
  const bench::Program program = {"bench_topk_gate",
                                  "the router's decision and its gradient",
                                  {"forward", "backward"},
                                  {DType::kFloat32},
                                  false};
  return bench::run_program(program, count, texts, measure);
}
