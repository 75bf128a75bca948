// SPDX-License-Identifier: Apache-2.0
#include "fomoe/topk_gate.h"

#include <memory>

#include "samples.h"

using fomoe::Gate;
using fomoe::GateScore;
using fomoe::GroupScore;
using samples::Array;
using samples::DType;
using Ints = std::vector<int32_t>;

namespace {

/// Arguments of one call and the memory behind them, of exactly their size.
struct Input {
  Input(DType dtype, const std::vector<double>& logits) : dtype(dtype), logits(dtype, logits) {}

  Input& with_bias(const std::vector<double>& values) {
    bias = std::make_unique<Array>(samples::accumulate_dtype(dtype), values);
    return *this;
  }

  Input& with_resident(const Ints& mask) {
    resident = std::make_unique<bool[]>(mask.size());
    std::copy(mask.begin(), mask.end(), resident.get());
    return *this;
  }

  fomoe::GateInput view() const {
    return {logits.data(), bias ? bias->data() : nullptr, resident.get()};
  }

  DType dtype;
  Array logits;
  std::unique_ptr<Array> bias;
  std::unique_ptr<bool[]> resident;
};

struct Result {
  Result(DType dtype, const Gate& gate)
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

Result gated(const Gate& gate, const Input& input) {
  Result result(input.dtype, gate);
  std::vector<char> workspace(fomoe::cpu::topk_gate_workspace_bytes(input.dtype, gate), '\xff');
  fomoe::cpu::topk_gate(input.dtype, gate, input.view(), result.view(), workspace.data());
  return result;
}

Ints ids_of(const std::vector<double>& logits, int64_t top_k) {
  const Gate gate = {1, static_cast<int64_t>(logits.size()), top_k, GateScore::kSoftmax, false, 1};
  return gated(gate, Input(DType::kFloat32, logits)).ids;
}

/// The same arguments in double, holding what the kernel sees.
Input widened(const Input& input, int64_t num_experts) {
  Input wide(DType::kFloat64, input.logits.values());
  if (input.bias) wide.with_bias(input.bias->values());
  if (input.resident) {
    wide.with_resident(Ints(input.resident.get(), input.resident.get() + num_experts));
  }
  return wide;
}

void check_gradient_against_the_reference(const Gate& gate, const Input& input, const Ints& ids) {
  const DType sum_dtype = samples::accumulate_dtype(input.dtype);
  const Array d_weights(sum_dtype, harness::random_values(gate.num_tokens * gate.top_k, 2));
  const Array d_prob_sum(sum_dtype, harness::random_values(gate.num_experts, 3));
  const Array d_z_sum(sum_dtype, std::vector<double>{0.25});
  const auto w = d_weights.values(), p = d_prob_sum.values(), z = d_z_sum.values();
  const Input wide = widened(input, gate.num_experts);
  std::vector<double> d_expected(gate.num_tokens * gate.num_experts);
  fomoe::reference::topk_gate_backward(gate, wide.view(), ids.data(),
                                       {w.data(), p.data(), z.data()}, d_expected.data());
  Array d_logits(input.dtype, gate.num_tokens * gate.num_experts);
  fomoe::cpu::topk_gate_backward(input.dtype, gate, input.view(), ids.data(),
                                 {d_weights.data(), d_prob_sum.data(), d_z_sum.data()},
                                 d_logits.data());
  CHECK_ALL_CLOSE(d_logits.values(), d_expected, samples::tolerance(input.dtype));
}

void check_against_the_reference(const Gate& gate, const Input& input) {
  Result expected(DType::kFloat64, gate);
  const Input wide = widened(input, gate.num_experts);
  fomoe::reference::topk_gate(gate, wide.view(), expected.view());
  const Result actual = gated(gate, input);
  const double tolerance = samples::tolerance(samples::accumulate_dtype(input.dtype));
  CHECK_EQUAL(actual.ids, expected.ids);
  CHECK_EQUAL(actual.counts, expected.counts);
  CHECK_ALL_CLOSE(actual.weights.values(), expected.weights.values(), tolerance);
  CHECK_ALL_CLOSE(actual.prob_sum.values(), expected.prob_sum.values(), tolerance);
  CHECK_ALL_CLOSE(actual.z_sum.values(), expected.z_sum.values(), tolerance);
  check_gradient_against_the_reference(gate, input, actual.ids);
}

}  // namespace

TEST(the_best_experts_come_first_with_their_softmax_probability) {
  const Gate gate = {1, 3, 2, GateScore::kSoftmax, false, 2};
  const Result result = gated(gate, Input(DType::kFloat64, {0, std::log(2.0), std::log(5.0)}));
  CHECK_EQUAL(result.ids, (Ints{2, 1}));
  CHECK_ALL_CLOSE(result.weights.values(), (std::vector<double>{10.0 / 8, 4.0 / 8}), 1e-15);
  CHECK_ALL_CLOSE(result.prob_sum.values(), (std::vector<double>{1. / 8, 2. / 8, 5. / 8}), 1e-15);
  CHECK_ALL_CLOSE(result.z_sum.values(), (std::vector<double>{std::log(8.0) * std::log(8.0)}),
                  1e-14);
  CHECK_EQUAL(result.counts, (std::vector<int64_t>{0, 1, 1}));
}

TEST(a_mask_hides_the_other_experts_and_fills_up_with_missing_ids) {
  // Of exp(logits) = 1, NaN, 5, 3 only experts 0 and 3 are eligible.
  const Gate gate = {1, 4, 3, GateScore::kSoftmax, false, 1};
  Input input(DType::kFloat64, {0, NAN, std::log(5.0), std::log(3.0)});
  const Result result = gated(gate, input.with_resident({1, 0, 0, 1}));
  CHECK_EQUAL(result.ids, (Ints{3, 0, -1}));
  CHECK_ALL_CLOSE(result.weights.values(), (std::vector<double>{3. / 4, 1. / 4, 0}), 1e-15);
  CHECK_ALL_CLOSE(result.prob_sum.values(), (std::vector<double>{1. / 4, 0, 0, 3. / 4}), 1e-15);
  CHECK_EQUAL(result.counts, (std::vector<int64_t>{1, 0, 0, 1}));
  const Result nothing = gated(gate, input.with_resident({0, 0, 0, 0}));
  CHECK_EQUAL(nothing.ids, (Ints{-1, -1, -1}));
  CHECK_EQUAL(nothing.weights.values(), (std::vector<double>{0, 0, 0}));
  CHECK_EQUAL(nothing.z_sum.values(), (std::vector<double>{0}));
}

TEST(experts_are_chosen_from_the_best_groups_only) {
  // Best scores of the groups: 9, 8, 7. Sums of two: 9, 14, 13.
  const std::vector<double> logits = {9, 0, 8, 6, 7, 6};
  Gate gate = {1, 6, 3, GateScore::kSoftmax, false, 1, false, 3, 2, GroupScore::kMax};
  CHECK_EQUAL(gated(gate, Input(DType::kFloat64, logits)).ids, (Ints{0, 2, 3}));
  gate.group_score = GroupScore::kTop2Sum;
  CHECK_EQUAL(gated(gate, Input(DType::kFloat64, logits)).ids, (Ints{2, 4, 3}));
}

TEST(ties_go_to_the_lower_index_and_nan_comes_last) {
  CHECK_EQUAL(ids_of({1, 2, 2, 1}, 4), (Ints{1, 2, 0, 3}));
  CHECK_EQUAL(ids_of({-0.0, 0.0, NAN, -INFINITY, NAN, INFINITY}, 6), (Ints{5, 0, 1, 3, 2, 4}));
}

TEST(the_path_for_many_choices_orders_as_the_one_for_few) {
  // 40 and 200 logits with many ties: the first 32 places must agree between both selections.
  for (int64_t count : {40, 200}) {
    std::vector<double> logits = harness::random_values(count, 3);
    for (double& logit : logits) logit = std::round(logit * 4);
    logits[7] = logits[31] = NAN;
    Ints many = ids_of(logits, 40);
    many.resize(32);
    CHECK_EQUAL(ids_of(logits, 32), many);
  }
}

TEST(every_dtype_score_and_size_equals_the_reference) {
  for (DType dtype : samples::kAllDTypes) {
    for (GateScore score : {GateScore::kSoftmax, GateScore::kSigmoid, GateScore::kUnit}) {
      for (int options = 0; options < 4; ++options) {
        const bool renormalize = options & 1, is_after = options & 2;
        for (Gate gate : {Gate{5, 17, 3, score, renormalize, 1.5, is_after},
                          Gate{130, 1, 1, score, renormalize, 1, is_after},
                          Gate{3, 40, 40, score, renormalize, 1, is_after},
                          Gate{4, 70, 9, score, renormalize, 1, is_after}}) {
          check_against_the_reference(
              gate, Input(dtype, harness::random_values(gate.num_tokens * gate.num_experts, 1)));
        }
      }
    }
  }
}

TEST(groups_masks_and_biases_equal_the_reference) {
  for (DType dtype : samples::kAllDTypes) {
    for (GateScore score : {GateScore::kSoftmax, GateScore::kSigmoid, GateScore::kUnit}) {
      for (GroupScore group_score : {GroupScore::kMax, GroupScore::kTop2Sum}) {
        for (const auto& [num_groups, top_k_groups] : {std::pair{1, 1}, {4, 2}, {6, 5}, {24, 20}}) {
          const Gate gate = {9, 24,    6,          score,        true,
                             2, false, num_groups, top_k_groups, group_score};
          if (gate.top_k > top_k_groups * (24 / num_groups)) continue;
          Input input(dtype, harness::random_values(9 * 24, 5));
          check_against_the_reference(gate, input);
          check_against_the_reference(gate, input.with_bias(harness::random_values(24, 6)));
          Ints resident(24);
          for (int e = 0; e < 24; ++e) resident[e] = e % 5 < 2 && e / 6 != 1;
          check_against_the_reference(gate, input.with_resident(resident));
          check_against_the_reference(gate, input.with_resident(Ints(24, 0)));
        }
      }
    }
  }
}

TEST(the_largest_number_of_experts_fits) {
  const std::vector<double> logits = harness::random_values(fomoe::kMaxExperts, 4);
  for (int64_t num_groups : {int64_t{1}, fomoe::kMaxExperts}) {
    const Gate gate = {1,     fomoe::kMaxExperts, fomoe::kMaxExperts, GateScore::kSigmoid, false, 1,
                       false, num_groups,         num_groups,         GroupScore::kTop2Sum};
    Result expected(DType::kFloat64, gate);
    fomoe::reference::topk_gate(gate, {logits.data()}, expected.view());
    CHECK_EQUAL(gated(gate, Input(DType::kFloat64, logits)).ids, expected.ids);
  }
}

TEST(no_tokens_give_zero_sums) {
  const Gate gate = {0, 4, 2, GateScore::kSoftmax, false, 1};
  const Result result = gated(gate, Input(DType::kFloat32, {}));
  CHECK_EQUAL(result.counts, (std::vector<int64_t>(4, 0)));
  CHECK_EQUAL(result.prob_sum.values(), (std::vector<double>(4, 0)));
  CHECK_EQUAL(result.z_sum.values(), (std::vector<double>{0}));
}
