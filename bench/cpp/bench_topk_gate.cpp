// SPDX-License-Identifier: Apache-2.0
#include "fomoe/topk_gate.h"

#include "harness.h"

namespace {

void run(bench::DType dtype, const fomoe::Gate& gate) {
  const int64_t slots = gate.num_tokens * gate.top_k, size = gate.num_tokens * gate.num_experts;
  const std::vector<char> logits = bench::random_array(dtype, size);
  std::vector<int32_t> ids(slots);
  std::vector<int64_t> counts(gate.num_experts);
  std::vector<char> weights = bench::random_array(bench::DType::kFloat32, slots);
  std::vector<char> prob_sum = bench::random_array(bench::DType::kFloat32, gate.num_experts);
  std::vector<char> z_sum = bench::random_array(bench::DType::kFloat32, 1);
  std::vector<char> grad_logits(logits.size());
  std::vector<char> workspace(fomoe::cpu::topk_gate_workspace_bytes(dtype, gate));
  const std::string shape =
      bench::shape({{"T", gate.num_tokens}, {"E", gate.num_experts}, {"K", gate.top_k}});
  const auto logit_bytes = static_cast<int64_t>(logits.size());
  const fomoe::GateResult result = {ids.data(), weights.data(), counts.data(), prob_sum.data(),
                                    z_sum.data()};
  bench::measure({"topk_gate", shape, dtype, logit_bytes + 8 * slots}, [&] {
    fomoe::cpu::topk_gate(dtype, gate, {logits.data()}, result, workspace.data());
  });
  const fomoe::GateGradient gradient = {weights.data(), prob_sum.data(), z_sum.data()};
  bench::measure({"topk_gate_backward", shape, dtype, 2 * logit_bytes + 8 * slots}, [&] {
    fomoe::cpu::topk_gate_backward(dtype, gate, {logits.data()}, ids.data(), gradient,
                                   grad_logits.data());
  });
}

}  // namespace

int main() {
  for (bench::DType dtype : {bench::DType::kFloat32, bench::DType::kBFloat16}) {
    run(dtype, {8192, 64, 8, fomoe::GateScore::kSoftmax, false, 1.0});
    run(dtype, {8192, 128, 8, fomoe::GateScore::kSigmoid, true, 1.0});
    run(dtype, {2048, 512, 10, fomoe::GateScore::kSoftmax, false, 1.0});
    run(dtype, {4096, 256, 8, fomoe::GateScore::kSigmoid, true, 2.5, false, 8, 4,
                fomoe::GroupScore::kTop2Sum});  // the groups of DeepSeek-V3
  }
}
