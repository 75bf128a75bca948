// SPDX-License-Identifier: Apache-2.0
#include "fomoe/topk_gate.h"

#include "fomoe/score.h"
#include "samples.h"

using fomoe::Gate;
using fomoe::GateScore;
using samples::Array;
using Ints = std::vector<int32_t>;

namespace {

struct Result {
  Result(samples::DType dtype, const Gate& gate)
      : ids(gate.num_tokens * gate.top_k, -7),
        weights(samples::accumulate_dtype(dtype), gate.num_tokens * gate.top_k),
        counts(gate.num_experts, -7),
        prob_sum(samples::accumulate_dtype(dtype), gate.num_experts),
        z_sum(samples::accumulate_dtype(dtype), 1) {}

  fomoe::GateResult view() {
    return {ids.data(), weights.data(), counts.data(), prob_sum.data(), z_sum.data()};
  }

  Ints ids;
  Array weights;
  std::vector<int64_t> counts;
  Array prob_sum, z_sum;
};

Result gated(samples::DType dtype, const Gate& gate, const Array& logits) {
  Result result(dtype, gate);
  std::vector<char> workspace(fomoe::cpu::topk_gate_workspace_bytes(dtype, gate), '\xff');
  fomoe::cpu::topk_gate(dtype, gate, logits.data(), result.view(), workspace.data());
  return result;
}

Ints ids_of(const std::vector<double>& logits, int64_t top_k) {
  const Gate gate = {1, static_cast<int64_t>(logits.size()), top_k, GateScore::kSoftmax, false, 1};
  return gated(samples::DType::kFloat32, gate, Array(samples::DType::kFloat32, logits)).ids;
}

void check_against_the_reference(samples::DType dtype, const Gate& gate) {
  const samples::DType sum_dtype = samples::accumulate_dtype(dtype);
  const Array logits(dtype, harness::random_values(gate.num_tokens * gate.num_experts, 1));
  Result expected(samples::DType::kFloat64, gate);
  fomoe::reference::topk_gate(gate, logits.values().data(), expected.view());
  const Result actual = gated(dtype, gate, logits);
  const double tolerance = samples::tolerance(sum_dtype);
  CHECK_EQUAL(actual.ids, expected.ids);
  CHECK_EQUAL(actual.counts, expected.counts);
  CHECK_ALL_CLOSE(actual.weights.values(), expected.weights.values(), tolerance);
  CHECK_ALL_CLOSE(actual.prob_sum.values(), expected.prob_sum.values(), tolerance);
  CHECK_ALL_CLOSE(actual.z_sum.values(), expected.z_sum.values(), tolerance);

  const Array d_weights(sum_dtype, harness::random_values(gate.num_tokens * gate.top_k, 2));
  const Array d_prob_sum(sum_dtype, harness::random_values(gate.num_experts, 3));
  const Array d_z_sum(sum_dtype, std::vector<double>{0.25});
  const auto w = d_weights.values(), p = d_prob_sum.values(), z = d_z_sum.values();
  std::vector<double> d_expected(gate.num_tokens * gate.num_experts);
  fomoe::reference::topk_gate_backward(gate, logits.values().data(), expected.ids.data(),
                                       {w.data(), p.data(), z.data()}, d_expected.data());
  Array d_logits(dtype, gate.num_tokens * gate.num_experts);
  fomoe::cpu::topk_gate_backward(dtype, gate, logits.data(), actual.ids.data(),
                                 {d_weights.data(), d_prob_sum.data(), d_z_sum.data()},
                                 d_logits.data());
  CHECK_ALL_CLOSE(d_logits.values(), d_expected, samples::tolerance(dtype));
}

}  // namespace

TEST(the_best_experts_come_first_with_their_softmax_probability) {
  const Gate gate = {1, 3, 2, GateScore::kSoftmax, false, 2};
  const Array logits(samples::DType::kFloat64, {0, std::log(2.0), std::log(5.0)});
  const Result result = gated(samples::DType::kFloat64, gate, logits);
  CHECK_EQUAL(result.ids, (Ints{2, 1}));
  CHECK_ALL_CLOSE(result.weights.values(), (std::vector<double>{2 * 5 / 8., 2 * 2 / 8.}), 1e-15);
  CHECK_ALL_CLOSE(result.prob_sum.values(), (std::vector<double>{1 / 8., 2 / 8., 5 / 8.}), 1e-15);
  CHECK_ALL_CLOSE(result.z_sum.values(), (std::vector<double>{std::log(8.0) * std::log(8.0)}),
                  1e-14);
  CHECK_EQUAL(result.counts, (std::vector<int64_t>{0, 1, 1}));
}

TEST(ties_go_to_the_lower_index_and_nan_comes_last) {
  CHECK_EQUAL(ids_of({1, 2, 2, 1}, 4), (Ints{1, 2, 0, 3}));
  CHECK_EQUAL(ids_of({-0.0, 0.0, NAN, -INFINITY, NAN, INFINITY}, 6), (Ints{5, 0, 1, 3, 2, 4}));
}

TEST(the_path_for_many_experts_orders_as_the_one_for_few) {
  // 40 logits with many ties: the first 32 places must agree between both selections.
  std::vector<double> logits = harness::random_values(40, 3);
  for (double& logit : logits) logit = std::round(logit * 4);
  logits[7] = logits[31] = NAN;
  Ints many = ids_of(logits, 40);
  many.resize(32);
  CHECK_EQUAL(ids_of(logits, 32), many);
}

TEST(score_keys_order_as_numbers_do) {
  const std::vector<float> ascending = {NAN, -INFINITY, -2, -1e-45f, 0, 1e-45f, 3, INFINITY};
  for (size_t i = 1; i < ascending.size(); ++i) {
    CHECK(fomoe::score_key(ascending[i - 1]) < fomoe::score_key(ascending[i]));
    CHECK(fomoe::score_key(static_cast<double>(ascending[i - 1])) <
          fomoe::score_key(static_cast<double>(ascending[i])));
  }
  CHECK_EQUAL(fomoe::score_key(-0.0f), fomoe::score_key(0.0f));
  CHECK_EQUAL(fomoe::score_key(-0.0), fomoe::score_key(0.0));
}

TEST(every_dtype_score_and_size_equals_the_reference) {
  for (samples::DType dtype : samples::kAllDTypes) {
    for (GateScore score : {GateScore::kSoftmax, GateScore::kSigmoid}) {
      for (bool renormalize : {false, true}) {
        check_against_the_reference(dtype, {5, 17, 3, score, renormalize, 1.5});
        check_against_the_reference(dtype, {130, 1, 1, score, renormalize, 1});
        check_against_the_reference(dtype, {3, 40, 40, score, renormalize, 1});
      }
    }
  }
}

TEST(the_largest_number_of_experts_fits) {
  const Gate gate = {1, fomoe::kMaxExperts, fomoe::kMaxExperts, GateScore::kSigmoid, false, 1};
  const Array logits(samples::DType::kFloat64, harness::random_values(fomoe::kMaxExperts, 4));
  Result expected(samples::DType::kFloat64, gate);
  fomoe::reference::topk_gate(gate, logits.values().data(), expected.view());
  CHECK_EQUAL(gated(samples::DType::kFloat64, gate, logits).ids, expected.ids);
}

TEST(no_tokens_give_zero_sums) {
  const Gate gate = {0, 4, 2, GateScore::kSoftmax, false, 1};
  const Result result = gated(samples::DType::kFloat32, gate, Array(samples::DType::kFloat32, 0));
  CHECK_EQUAL(result.counts, (std::vector<int64_t>(4, 0)));
  CHECK_EQUAL(result.prob_sum.values(), (std::vector<double>(4, 0)));
  CHECK_EQUAL(result.z_sum.values(), (std::vector<double>{0}));
}
