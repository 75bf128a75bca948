// SPDX-License-Identifier: Apache-2.0
#include "cuda/gate_samples.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

using namespace gate_samples;

namespace {

/// Gradients of the outputs, of which any may be missing.
struct Gradients {
  std::optional<Values> weights, prob_sum, z_sum;
};

template <typename Array>
std::unique_ptr<Array> placed_values(DType dtype, const std::optional<Values>& values) {
  if (!values) return nullptr;
  return std::make_unique<Array>(samples::accumulate_dtype(dtype), *values);
}

template <typename Array>
const void* data_of(const std::unique_ptr<Array>& array) {
  return array ? array->data() : nullptr;
}

Ints ids_on_cpu(const Gate& gate, const Input& input) {
  const auto placed = on_cpu(input);
  const DType sum_dtype = samples::accumulate_dtype(input.dtype);
  Ints ids(gate.num_tokens * gate.top_k);
  std::vector<int64_t> counts(gate.num_experts);
  samples::Array weights(sum_dtype, gate.num_tokens * gate.top_k),
      prob_sum(sum_dtype, gate.num_experts), z_sum(sum_dtype, 1);
  std::vector<char> workspace(fomoe::cpu::topk_gate_workspace_bytes(input.dtype, gate));
  fomoe::cpu::topk_gate(input.dtype, gate, placed.view(),
                        {ids.data(), weights.data(), counts.data(), prob_sum.data(), z_sum.data()},
                        workspace.data());
  return ids;
}

Values gradient_on_cpu(const Gate& gate, const Input& input, const Ints& ids,
                       const Gradients& gradients) {
  const auto placed = on_cpu(input);
  const auto weights = placed_values<samples::Array>(input.dtype, gradients.weights),
             prob_sum = placed_values<samples::Array>(input.dtype, gradients.prob_sum),
             z_sum = placed_values<samples::Array>(input.dtype, gradients.z_sum);
  samples::Array result(input.dtype, gate.num_tokens * gate.num_experts);
  fomoe::cpu::topk_gate_backward(input.dtype, gate, placed.view(), ids.data(),
                                 {data_of(weights), data_of(prob_sum), data_of(z_sum)},
                                 result.data());
  return result.values();
}

Values gradient_on_gpu(const Gate& gate, const Input& input, const Ints& ids,
                       const Gradients& gradients) {
  const auto placed = on_gpu(input);
  const auto weights = placed_values<on_device::Array>(input.dtype, gradients.weights),
             prob_sum = placed_values<on_device::Array>(input.dtype, gradients.prob_sum),
             z_sum = placed_values<on_device::Array>(input.dtype, gradients.z_sum);
  const on_device::Vector<int32_t> device_ids(ids);
  const on_device::Array result(input.dtype, gate.num_tokens * gate.num_experts,
                                input.misalignment);
  const on_device::Memory workspace(
      fomoe::cuda::topk_gate_backward_workspace_bytes(input.dtype, gate));
  fomoe::cuda::topk_gate_backward(input.dtype, gate, placed.view(), device_ids.data(),
                                  {data_of(weights), data_of(prob_sum), data_of(z_sum)},
                                  result.data(), workspace.data(), nullptr);
  return result.values();
}

double gradient_tolerance(DType dtype, const Gate& gate) {
  return std::max(tolerance_of(dtype, gate.top_k), dtype == DType::kBFloat16  ? 0x1p-7
                                                   : dtype == DType::kFloat16 ? 0x1p-10
                                                                              : 0.0);
}

Gradients random_gradients(std::mt19937& engine, const Gate& gate) {
  const auto seed = static_cast<uint32_t>(engine());
  Gradients gradients;
  if (engine() % 4) {
    gradients.weights = harness::random_values(gate.num_tokens * gate.top_k, seed);
  }
  if (engine() % 4) gradients.prob_sum = harness::random_values(gate.num_experts, seed + 1);
  if (engine() % 4) gradients.z_sum = Values{0.25};
  return gradients;
}

void check_equals_cpu(const Gate& gate, const Input& input, const Gradients& gradients) {
  const Ints ids = ids_on_cpu(gate, input);
  CHECK(are_close(gradient_on_gpu(gate, input, ids, gradients),
                  gradient_on_cpu(gate, input, ids, gradients),
                  gradient_tolerance(input.dtype, gate)));
}

void search(int64_t num_tokens, int64_t num_experts, int64_t top_k, int rounds) {
  std::mt19937 engine(static_cast<uint32_t>(num_experts * 64 + top_k));
  for (int round = 0; round < rounds; ++round) {
    for (const Kind kind : kAllKinds) {
      const Gate gate = random_gate(engine, num_tokens, num_experts, top_k);
      const Input input = random_input(engine, gate, kind);
      check_equals_cpu(gate, input, random_gradients(engine, gate));
    }
  }
}

}  // namespace

TEST(few_experts_equal_the_cpu) {
  search(5, 1, 1, 2);
  search(70, 4, 2, 6);
  search(33, 7, 7, 6);
  search(19, 16, 3, 6);
}

TEST(tens_of_experts_equal_the_cpu) {
  search(37, 64, 8, 8);
  search(18, 60, 6, 6);
  search(19, 128, 8, 8);
}

TEST(hundreds_of_experts_equal_the_cpu) {
  search(9, 160, 6, 6);
  search(5, 250, 250, 6);
  search(5, 512, 10, 6);
}

TEST(thousands_of_experts_equal_the_cpu) {
  search(3, 513, 8, 6);
  search(2, 1024, 100, 4);
  search(1, 4096, 4096, 2);
}

TEST(missing_gradients_are_zeros) {
  const Gate gate = {3, 5, 2, GateScore::kSoftmax, false, 1};
  const Input input = {DType::kFloat32, logits_of(Kind::kRandom, 15, 1), {}, {}};
  CHECK_EQUAL(gradient_on_gpu(gate, input, Ints(6, 0), {}), Values(15, 0));
}

TEST(experts_that_are_not_eligible_get_zeros) {
  const Gate gate = {2, 4, 2, GateScore::kSigmoid, true, 1};
  const Input input = {DType::kFloat32, Values(8, NAN), {}, Ints(4, 0)};
  const Gradients gradients = {Values(4, 1), Values(4, 1), Values(1, 1)};
  CHECK_EQUAL(gradient_on_gpu(gate, input, Ints(4, -1), gradients), Values(8, 0));
}

TEST(wrong_ids_count_as_missing) {
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min(), kHighest = ~kLowest;
  for (const int64_t num_experts : {6, 600}) {
    const Gate gate = {3, num_experts, 2, GateScore::kSoftmax, true, 1};
    Input input = {DType::kFloat32, logits_of(Kind::kRandom, 3 * num_experts, 2), {}, {}};
    input.resident = Ints(num_experts, 1);
    (*input.resident)[4] = 0;
    const Gradients gradients = {harness::random_values(6, 3), {}, {}};
    const auto too_large = static_cast<int32_t>(num_experts);
    CHECK(
        are_close(gradient_on_gpu(gate, input, {kLowest, 1, too_large, kHighest, -2, 4}, gradients),
                  gradient_on_cpu(gate, input, {-1, 1, -1, -1, -1, -1}, gradients), 1e-6));
  }
}

TEST(no_tokens_have_no_gradient) {
  for (const int64_t num_experts : {4, 600}) {
    const Gate gate = {0, num_experts, 2, GateScore::kSoftmax, false, 1};
    CHECK_EQUAL(gradient_on_gpu(gate, {DType::kBFloat16, {}, {}, {}}, {}, {}), Values());
  }
}

#ifdef FOMOE_EMULATION

// T E logits and T K ids and gradients in, T E gradients out.
TEST(reads_each_logit_once_and_writes_each_gradient_once) {
  for (const int64_t num_experts : {64, 256, 1024}) {
    const Gate gate = {37, num_experts, 8, GateScore::kSoftmax, false, 1};
    const int64_t num_slots = 37 * 8, row_bytes = 4 * 37 * num_experts;
    const on_device::Array logits(DType::kFloat32, harness::random_values(37 * num_experts, 1)),
        d_weights(DType::kFloat32, harness::random_values(num_slots, 2)),
        d_logits(DType::kFloat32, 37 * num_experts);
    const on_device::Vector<int32_t> ids(samples::random_ids(num_slots, 64, 3));
    const auto counters = fomoe::emulation::count([&] {
      fomoe::cuda::topk_gate_backward(DType::kFloat32, gate, {logits.data()}, ids.data(),
                                      {d_weights.data(), nullptr, nullptr}, d_logits.data(),
                                      nullptr, nullptr);
    });
    CHECK_EQUAL(counters.size(), 1u);
    const auto& counts = counters.at("topk_gate_backward");
    const auto read = counts.loads(logits.data(), row_bytes);
    CHECK_EQUAL(read.bytes, row_bytes);
    CHECK_EQUAL(read.distinct_bytes, row_bytes);
    CHECK_EQUAL(read.sectors * 32, row_bytes);
    CHECK_EQUAL(counts.loads(ids.data(), 4 * num_slots).bytes, 4 * num_slots);
    CHECK(counts.loads(d_weights.data(), 4 * num_slots).bytes <= 4 * num_slots);
    CHECK_EQUAL(counts.stores().bytes, row_bytes);
    CHECK_EQUAL(counts.stores().distinct_bytes, row_bytes);
    CHECK_EQUAL(counts.stores().sectors * 32, row_bytes);
  }
}

#endif
