// SPDX-License-Identifier: Apache-2.0
#include "cuda/gate_samples.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

using namespace gate_samples;

namespace {

struct Result {
  Ints ids;
  Values weights, prob_sum, z_sum;
  std::vector<int64_t> counts;
};

Result gated_on_cpu(const Gate& gate, const Input& input) {
  const auto placed = on_cpu(input);
  const DType sum_dtype = samples::accumulate_dtype(input.dtype);
  const int64_t num_slots = gate.num_tokens * gate.top_k;
  Ints ids(num_slots);
  std::vector<int64_t> counts(gate.num_experts);
  samples::Array weights(sum_dtype, num_slots), prob_sum(sum_dtype, gate.num_experts),
      z_sum(sum_dtype, 1);
  std::vector<char> workspace(fomoe::cpu::topk_gate_workspace_bytes(input.dtype, gate));
  fomoe::cpu::topk_gate(input.dtype, gate, placed.view(),
                        {ids.data(), weights.data(), counts.data(), prob_sum.data(), z_sum.data()},
                        workspace.data());
  return {ids, weights.values(), prob_sum.values(), z_sum.values(), counts};
}

Result gated_on_gpu(const Gate& gate, const Input& input) {
  const auto placed = on_gpu(input);
  const DType sum_dtype = samples::accumulate_dtype(input.dtype);
  const int64_t num_slots = gate.num_tokens * gate.top_k;
  const on_device::Vector<int32_t> ids(num_slots);
  const on_device::Vector<int64_t> counts(gate.num_experts);
  const on_device::Array weights(sum_dtype, num_slots), prob_sum(sum_dtype, gate.num_experts),
      z_sum(sum_dtype, 1);
  const on_device::Memory workspace(fomoe::cuda::topk_gate_workspace_bytes(input.dtype, gate));
  fomoe::cuda::topk_gate(input.dtype, gate, placed.view(),
                         {ids.data(), weights.data(), counts.data(), prob_sum.data(), z_sum.data()},
                         workspace.data(), nullptr);
  return {ids.values(), weights.values(), prob_sum.values(), z_sum.values(), counts.values()};
}

void check_equals_cpu(const Gate& gate, const Input& input) {
  const Result expected = gated_on_cpu(gate, input), actual = gated_on_gpu(gate, input);
  const double tolerance = tolerance_of(input.dtype, gate.top_k);
  CHECK_EQUAL(actual.ids, expected.ids);
  CHECK(actual.counts == expected.counts);
  CHECK(are_close(actual.weights, expected.weights, tolerance));
  CHECK(are_close(actual.prob_sum, expected.prob_sum, tolerance));
  CHECK(are_close(actual.z_sum, expected.z_sum, tolerance));
}

/// All kinds of logits, `rounds` times with whatever the menu offers.
void search(int64_t num_tokens, int64_t num_experts, int64_t top_k, int rounds) {
  std::mt19937 engine(static_cast<uint32_t>(num_experts * 64 + top_k));
  for (int round = 0; round < rounds; ++round) {
    for (const Kind kind : kAllKinds) {
      const Gate gate = random_gate(engine, num_tokens, num_experts, top_k);
      check_equals_cpu(gate, random_input(engine, gate, kind));
    }
  }
}

}  // namespace

TEST(the_best_experts_come_first_with_their_softmax_probability) {
  const Gate gate = {1, 3, 2, GateScore::kSoftmax, false, 2};
  const Result result =
      gated_on_gpu(gate, {DType::kFloat64, {0, std::log(2.0), std::log(5.0)}, {}, {}});
  CHECK_EQUAL(result.ids, (Ints{2, 1}));
  CHECK(are_close(result.weights, {10.0 / 8, 4.0 / 8}, 1e-15));
  CHECK(are_close(result.prob_sum, {1. / 8, 2. / 8, 5. / 8}, 1e-15));
  CHECK(are_close(result.z_sum, {std::log(8.0) * std::log(8.0)}, 1e-14));
  CHECK_EQUAL(result.counts, (std::vector<int64_t>{0, 1, 1}));
}

TEST(few_experts_equal_the_cpu) {
  search(5, 1, 1, 3);
  search(70, 4, 2, 3);
  search(33, 7, 7, 3);
  search(19, 16, 3, 3);
}

TEST(tens_of_experts_equal_the_cpu) {
  search(9, 17, 5, 3);
  search(37, 64, 8, 4);
  search(18, 60, 6, 3);
  search(19, 128, 8, 4);
}

TEST(hundreds_of_experts_equal_the_cpu) {
  search(9, 160, 6, 3);
  search(10, 256, 8, 4);
  search(5, 250, 32, 3);
  search(5, 512, 10, 3);
}

TEST(thousands_of_experts_equal_the_cpu) {
  search(3, 513, 8, 3);
  search(2, 1024, 31, 4);
  search(2, 4096, 36, 3);
}

TEST(many_choices_equal_the_cpu) {
  search(3, 33, 33, 3);
  search(3, 40, 40, 4);
  search(2, 256, 64, 4);
  search(2, 300, 257, 4);
  search(1, 1000, 1000, 2);
  search(1, 4096, 4096, 1);
}

TEST(a_block_adds_up_many_tokens) {
  for (const auto& [num_tokens, num_experts] : {std::pair{140, 2}, {2120, 500}, {530, 600}}) {
    const Gate gate = {num_tokens, num_experts, 2, GateScore::kSoftmax, true, 1};
    const Values logits = logits_of(Kind::kRandom, gate.num_tokens * gate.num_experts, 6);
    check_equals_cpu(gate, {DType::kFloat32, logits, {}, {}});
  }
}

TEST(no_eligible_experts_give_missing_ids_and_zero_sums) {
  for (const int64_t num_experts : {6, 600}) {
    const Gate gate = {3, num_experts, 2, GateScore::kSigmoid, true, 1};
    const Input input = {
        DType::kFloat32, logits_of(Kind::kSpecial, 3 * num_experts, 7), {}, Ints(num_experts, 0)};
    const Result result = gated_on_gpu(gate, input);
    CHECK_EQUAL(result.ids, Ints(6, -1));
    CHECK_EQUAL(result.weights, Values(6, 0));
    CHECK_EQUAL(result.prob_sum, Values(num_experts, 0));
    CHECK_EQUAL(result.z_sum, Values(1, 0));
  }
}

TEST(no_tokens_give_zero_sums) {
  for (const int64_t num_experts : {4, 600}) {
    const Gate gate = {0, num_experts, 2, GateScore::kSoftmax, false, 1};
    const Result result = gated_on_gpu(gate, {DType::kBFloat16, {}, {}, {}});
    CHECK_EQUAL(result.counts, std::vector<int64_t>(num_experts, 0));
    CHECK_EQUAL(result.prob_sum, Values(num_experts, 0));
    CHECK_EQUAL(result.z_sum, Values(1, 0));
  }
}

TEST(the_same_call_gives_the_same_bits) {
  for (const int64_t num_experts : {64, 700}) {
    const Gate gate = {40, num_experts, 8, GateScore::kSigmoid, true, 1};
    const Input input = {DType::kFloat32, logits_of(Kind::kRandom, 40 * num_experts, 8), {}, {}};
    const Result first = gated_on_gpu(gate, input), second = gated_on_gpu(gate, input);
    CHECK(first.ids == second.ids && first.weights == second.weights &&
          first.counts == second.counts && first.prob_sum == second.prob_sum &&
          first.z_sum == second.z_sum);
  }
}

#ifdef FOMOE_EMULATION

// T E logits in; T K ids and weights out; and the sums over tokens.
TEST(reads_each_logit_once_and_writes_each_choice_once) {
  for (const int64_t num_experts : {64, 128, 256, 1024}) {
    const Gate gate = {37, num_experts, 8, GateScore::kSoftmax, false, 1};
    const int64_t num_slots = 37 * 8, logit_bytes = 4 * 37 * num_experts;
    const on_device::Array logits(DType::kFloat32, harness::random_values(37 * num_experts, 1));
    const on_device::Vector<int32_t> ids(num_slots);
    const on_device::Vector<int64_t> counts(num_experts);
    const on_device::Vector<float> weights(num_slots), prob_sum(num_experts), z_sum(1);
    const on_device::Memory workspace(
        fomoe::cuda::topk_gate_workspace_bytes(DType::kFloat32, gate));
    const auto counters = fomoe::emulation::count([&] {
      fomoe::cuda::topk_gate(
          DType::kFloat32, gate, {logits.data()},
          {ids.data(), weights.data(), counts.data(), prob_sum.data(), z_sum.data()},
          workspace.data(), nullptr);
    });
    CHECK_EQUAL(counters.size(), 2u);  // the gate, and its sums
    const auto& gate_counts = counters.at("topk_gate");
    const auto& sum_counts = counters.at("topk_gate_sums");
    CHECK_EQUAL(gate_counts.loads().bytes, logit_bytes);
    CHECK_EQUAL(gate_counts.loads(logits.data(), logit_bytes).distinct_bytes, logit_bytes);
    CHECK_EQUAL(gate_counts.loads().sectors * 32, logit_bytes);
    const auto written_ids = gate_counts.stores(ids.data(), 4 * num_slots);
    const auto written_weights = gate_counts.stores(weights.data(), 4 * num_slots);
    CHECK_EQUAL(written_ids.bytes, 4 * num_slots);
    CHECK_EQUAL(written_ids.distinct_bytes, 4 * num_slots);
    CHECK_EQUAL(written_weights.bytes, 4 * num_slots);
    CHECK_EQUAL(written_weights.distinct_bytes, 4 * num_slots);
    const int64_t block_sums = gate_counts.stores().bytes - 8 * num_slots;
    CHECK_EQUAL(block_sums, gate_counts.blocks * (8 * num_experts + 8));
    CHECK_EQUAL(sum_counts.loads().bytes, block_sums);
    CHECK_EQUAL(sum_counts.stores().bytes, 12 * num_experts + 4);
  }
}

#endif
