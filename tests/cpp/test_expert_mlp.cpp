// SPDX-License-Identifier: Apache-2.0
#include "fomoe/expert_mlp.h"

#include "samples.h"

using fomoe::Activation;
using fomoe::ExpertMlp;
using samples::Array;

namespace {

const fomoe::Gemm kGemm = fomoe::reference::gemm();

/// Inputs of one dtype and the same values in double.
struct Case {
  Case(samples::DType dtype, Activation activation, int64_t num_tokens, int64_t top_k, int64_t dim,
       int64_t expert_dim)
      : dtype(dtype),
        routing(samples::random_routing(num_tokens, top_k, 5)),
        pre_dim(expert_dim * (activation == Activation::kSwiglu ? 2 : 1)),
        x(dtype, harness::random_values(num_tokens * dim, 1)),
        grad_y(dtype, harness::random_values(num_tokens * dim, 2)),
        weights(samples::accumulate_dtype(dtype), harness::random_values(num_tokens * top_k, 3)),
        w1(dtype, harness::random_values(3 * pre_dim * dim, 4)),
        w2(dtype, harness::random_values(3 * dim * expert_dim, 6)),
        w1_double(w1.values()),
        w2_double(w2.values()),
        mlp(of(dtype, activation, w1.data(), w2.data(), dim, expert_dim)),
        mlp_double(of(samples::DType::kFloat64, activation, w1_double.data(), w2_double.data(), dim,
                      expert_dim)) {}

  ExpertMlp of(samples::DType type, Activation activation, const void* first, const void* second,
               int64_t dim, int64_t expert_dim) const {
    return {activation,
            {type, first, 3, pre_dim, dim, pre_dim * dim, dim, 1},
            {type, second, 3, dim, expert_dim, dim * expert_dim, expert_dim, 1},
            routing.view};
  }

  samples::DType dtype;
  samples::OwnedRouting routing;
  int64_t pre_dim;
  Array x, grad_y, weights, w1, w2;
  std::vector<double> w1_double, w2_double;
  ExpertMlp mlp, mlp_double;
};

void check_against_the_reference(const Case& sample) {
  const int64_t tokens = sample.routing.view.num_tokens, rows = sample.routing.view.num_rows();
  const int64_t dim = sample.mlp.dim(), pre_dim = sample.pre_dim;
  const auto w1_size = static_cast<int64_t>(sample.w1_double.size());
  const auto w2_size = static_cast<int64_t>(sample.w2_double.size());
  std::vector<double> y_expected(tokens * dim), pre_expected(rows * pre_dim), d_x(tokens * dim),
      d_weights(rows), d_w1(w1_size), d_w2(w2_size);
  fomoe::reference::expert_mlp(sample.mlp_double, sample.x.values().data(),
                               sample.weights.values().data(), y_expected.data(),
                               pre_expected.data());
  fomoe::reference::expert_mlp_backward(sample.mlp_double, sample.grad_y.values().data(),
                                        sample.x.values().data(), sample.weights.values().data(),
                                        {d_x.data(), d_weights.data(), d_w1.data(), d_w2.data()});

  const samples::DType dtype = sample.dtype;
  Array y(dtype, tokens * dim), pre(dtype, rows * pre_dim);
  // Exactly what the kernel asks for, full of NaN.
  std::vector<char> workspace(fomoe::cpu::expert_mlp_workspace_bytes(sample.mlp), '\xff');
  fomoe::cpu::expert_mlp(sample.mlp, sample.x.data(), sample.weights.data(), kGemm, y.data(),
                         pre.data(), workspace.data());
  // Pre-activation, hidden and output are each rounded to a 16-bit type.
  const double tolerance = samples::tolerance(dtype) * (fomoe::size_of(dtype) == 2 ? 4 : 1);
  CHECK_ALL_CLOSE(y.values(), y_expected, tolerance);
  CHECK_ALL_CLOSE(pre.values(), pre_expected, tolerance);

  Array actual_x(dtype, tokens * dim), actual_w1(dtype, w1_size), actual_w2(dtype, w2_size),
      actual_weights(samples::accumulate_dtype(dtype), rows);
  workspace.assign(fomoe::cpu::expert_mlp_backward_workspace_bytes(sample.mlp), '\xff');
  fomoe::cpu::expert_mlp_backward(
      sample.mlp, sample.grad_y.data(), sample.x.data(), sample.weights.data(), pre.data(), kGemm,
      {actual_x.data(), actual_weights.data(), actual_w1.data(), actual_w2.data()},
      workspace.data());
  CHECK_ALL_CLOSE(actual_x.values(), d_x, tolerance);
  CHECK_ALL_CLOSE(actual_weights.values(), d_weights, tolerance);
  CHECK_ALL_CLOSE(actual_w1.values(), d_w1, tolerance);
  CHECK_ALL_CLOSE(actual_w2.values(), d_w2, tolerance);
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
                         routing.view};
  std::vector<double> y(1), pre(2);
  std::vector<char> workspace(fomoe::cpu::expert_mlp_workspace_bytes(mlp));
  fomoe::cpu::expert_mlp(mlp, x.data(), weights.data(), kGemm, y.data(), pre.data(),
                         workspace.data());
  CHECK_EQUAL(pre, (std::vector<double>{2, 6}));
  CHECK_CLOSE(y[0], 10 * 5 * (2 / (1 + std::exp(-2.0)) * 6), 1e-12);
}

TEST(every_dtype_and_activation_equals_the_reference) {
  for (samples::DType dtype : samples::kAllDTypes) {
    for (Activation activation : {Activation::kSwiglu, Activation::kSilu}) {
      check_against_the_reference(Case(dtype, activation, 13, 3, 5, 7));
    }
  }
}

TEST(an_expert_wider_than_one_tile_equals_the_reference) {
  for (Activation activation : {Activation::kSwiglu, Activation::kSilu}) {
    check_against_the_reference(Case(samples::DType::kFloat64, activation, 4, 2, 3, 600));
  }
}

TEST(an_expert_with_more_rows_than_one_run_equals_the_reference) {
  check_against_the_reference(Case(samples::DType::kFloat64, Activation::kSwiglu, 2000, 2, 2, 3));
}

TEST(no_tokens_give_zero_weight_gradients) {
  check_against_the_reference(Case(samples::DType::kFloat32, Activation::kSwiglu, 0, 2, 3, 4));
}
