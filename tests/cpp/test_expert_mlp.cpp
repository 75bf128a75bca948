// SPDX-License-Identifier: Apache-2.0
#include "fomoe/expert_mlp.h"

#include "expert_mlp_case.h"

using namespace expert_mlp_case;

namespace {

const fomoe::Gemm kGemm = fomoe::reference::gemm();

void check_against_the_reference(const Case& sample) {
  const int64_t tokens = sample.routing.view.num_tokens, rows = sample.routing.view.num_rows();
  const int64_t dim = sample.mlp.dim(), pre_dim = sample.pre_dim;
  const bool has_biases = sample.mlp.b1 != nullptr;
  std::vector<double> y_expected(tokens * dim), pre_expected(rows * pre_dim);
  fomoe::reference::expert_mlp(sample.mlp_double, sample.x.values().data(),
                               sample.weights.values().data(), y_expected.data(),
                               pre_expected.data());
  std::array<Array, 6> expected = gradient_arrays(sample, samples::DType::kFloat64);
  fomoe::reference::expert_mlp_backward(sample.mlp_double, sample.grad_y.values().data(),
                                        sample.x.values().data(), sample.weights.values().data(),
                                        view(expected, has_biases));

  const samples::DType dtype = sample.dtype;
  Array y(dtype, tokens * dim), pre(dtype, rows * pre_dim), y_alone(dtype, tokens * dim);
  // Exactly what the kernel asks for, full of NaN.
  std::vector<char> workspace(fomoe::cpu::expert_mlp_workspace_bytes(sample.mlp), '\xff');
  fomoe::cpu::expert_mlp(sample.mlp, sample.x.data(), sample.weights.data(), kGemm, y.data(),
                         pre.data(), workspace.data());
  fomoe::cpu::expert_mlp(sample.mlp, sample.x.data(), sample.weights.data(), kGemm, y_alone.data(),
                         nullptr, workspace.data());
  CHECK(y_alone.bytes() == y.bytes());
  // Pre-activation, hidden and output are each rounded to a 16-bit type.
  const double tolerance = samples::tolerance(dtype) * (fomoe::size_of(dtype) == 2 ? 4 : 1);
  CHECK_ALL_CLOSE(y.values(), y_expected, tolerance);
  CHECK_ALL_CLOSE(pre.values(), pre_expected, tolerance);

  std::array<Array, 6> actual = gradient_arrays(sample, dtype);
  workspace.assign(fomoe::cpu::expert_mlp_backward_workspace_bytes(sample.mlp), '\xff');
  fomoe::cpu::expert_mlp_backward(sample.mlp, sample.grad_y.data(), sample.x.data(),
                                  sample.weights.data(), pre.data(), kGemm,
                                  view(actual, has_biases), workspace.data());
  for (size_t i = 0; i < actual.size(); ++i) {
    CHECK_ALL_CLOSE(actual[i].values(), expected[i].values(), tolerance);
  }
  // Gradients that nobody wants change nothing else.
  std::array<Array, 6> wanted = gradient_arrays(sample, dtype);
  fomoe::ExpertMlpGradient only_weights = view(wanted, false);
  only_weights.x = only_weights.w1 = only_weights.w2 = nullptr;
  fomoe::cpu::expert_mlp_backward(sample.mlp, sample.grad_y.data(), sample.x.data(),
                                  sample.weights.data(), pre.data(), kGemm, only_weights,
                                  workspace.data());
  CHECK(wanted[1].bytes() == actual[1].bytes());
}

}  // namespace

TEST(swiglu_is_silu_of_the_gate_times_up) {
  // One token, one expert, D = F = 1: gate = 2 * 1, up = 2 * 3.
  const std::vector<double> x = {2}, weights = {10}, w1 = {1, 3}, w2 = {5};
  const samples::OwnedRouting routing({0}, 1, {0}, 1);
  const samples::DType f64 = samples::DType::kFloat64;
  const ExpertMlp mlp = {Activation::kSwiglu,
                         {f64, w1.data(), 1, 2, 1, 2, 1, 1},
                         {f64, w2.data(), 1, 1, 1, 1, 1, 1},
                         nullptr,
                         nullptr,
                         routing.view};
  std::vector<double> y(1), pre(2);
  std::vector<char> workspace(fomoe::cpu::expert_mlp_workspace_bytes(mlp));
  fomoe::cpu::expert_mlp(mlp, x.data(), weights.data(), kGemm, y.data(), pre.data(),
                         workspace.data());
  CHECK_EQUAL(pre, (std::vector<double>{2, 6}));
  CHECK_CLOSE(y[0], 10 * 5 * (2 / (1 + std::exp(-2.0)) * 6), 1e-12);
}

TEST(a_clamped_gate_or_up_has_no_gradient) {
  // D = F = 1, x = 1: pre is w1. The gate is beyond the limit, then the up is, on either side.
  const samples::DType f64 = samples::DType::kFloat64;
  const samples::OwnedRouting routing({0}, 1, {0}, 1);
  for (const auto& [gate, up] : std::vector<std::pair<double, double>>{{9, 3}, {2, 9}, {2, -9}}) {
    const std::vector<double> one = {1}, w1 = {gate, up};
    const ExpertMlp mlp = {Activation::kSwigluClamped,
                           {f64, w1.data(), 1, 2, 1, 2, 1, 1},
                           {f64, one.data(), 1, 1, 1, 1, 1, 1},
                           nullptr,
                           nullptr,
                           routing.view};
    std::vector<double> y(1), pre(2), d_x(1), d_weights(1), d_w1(2), d_w2(1);
    std::vector<char> workspace(fomoe::cpu::expert_mlp_backward_workspace_bytes(mlp) +
                                fomoe::cpu::expert_mlp_workspace_bytes(mlp));
    fomoe::cpu::expert_mlp(mlp, one.data(), one.data(), kGemm, y.data(), pre.data(),
                           workspace.data());
    const double g = std::min(gate, 7.0), u = std::clamp(up, -7.0, 7.0);
    CHECK_CLOSE(y[0], g / (1 + std::exp(-1.702 * g)) * (u + 1), 1e-12);
    fomoe::cpu::expert_mlp_backward(
        mlp, one.data(), one.data(), one.data(), pre.data(), kGemm,
        {d_x.data(), d_weights.data(), d_w1.data(), d_w2.data(), nullptr, nullptr},
        workspace.data());
    CHECK_EQUAL(d_w1[0] == 0, gate > 7);
    CHECK_EQUAL(d_w1[1] == 0, std::abs(up) > 7);
  }
}

TEST(every_dtype_and_activation_equals_the_reference) {
  for (samples::DType dtype : samples::kAllDTypes) {
    for (Activation activation : kActivations) {
      const Case sample(dtype, activation, 13, 3, 5, 7);
      check_against_the_reference(sample);
      check_against_the_reference(sample.without_biases());
    }
  }
}

TEST(an_expert_wider_than_one_tile_equals_the_reference) {
  for (Activation activation : kActivations) {
    check_against_the_reference(Case(samples::DType::kFloat64, activation, 4, 2, 3, 600));
  }
}

TEST(an_expert_with_more_rows_than_one_run_equals_the_reference) {
  check_against_the_reference(Case(samples::DType::kFloat64, Activation::kSwiglu, 2000, 2, 2, 3));
}

TEST(no_tokens_give_zero_weight_gradients) {
  check_against_the_reference(Case(samples::DType::kFloat32, Activation::kSwiglu, 0, 2, 3, 4));
}
