// SPDX-License-Identifier: Apache-2.0
// Inputs of expert_mlp that the tests of the CPU and of the CUDA op share.
#pragma once

#include <array>
#include <utility>

#include "fomoe/expert_mlp.h"
#include "samples.h"

namespace expert_mlp_case {

using fomoe::Activation;
using fomoe::ExpertMlp;
using samples::Array;

inline constexpr Activation kActivations[] = {Activation::kSwiglu, Activation::kSilu,
                                              Activation::kSwigluClamped};

/// Inputs of one dtype and the same values in double.
struct Case {
  Case(samples::DType dtype, Activation activation, int64_t num_tokens, int64_t top_k, int64_t dim,
       int64_t expert_dim)
      : Case(dtype, activation, samples::random_routing(num_tokens, top_k, 5), dim, expert_dim) {}

  Case(samples::DType dtype, Activation activation, samples::OwnedRouting&& to_three_experts,
       int64_t dim, int64_t expert_dim)
      : dtype(dtype),
        routing(std::move(to_three_experts)),
        pre_dim(expert_dim * (fomoe::is_gated(activation) ? 2 : 1)),
        x(dtype, harness::random_values(routing.view.num_tokens * dim, 1)),
        grad_y(dtype, harness::random_values(routing.view.num_tokens * dim, 2)),
        weights(samples::accumulate_dtype(dtype),
                harness::random_values(routing.view.num_rows(), 3)),
        w1(dtype, harness::random_values(3 * pre_dim * dim, 4)),
        w2(dtype, harness::random_values(3 * dim * expert_dim, 6)),
        b1(dtype, harness::random_values(3 * pre_dim, 7)),
        b2(dtype, harness::random_values(3 * dim, 8)),
        in_double{w1.values(), w2.values(), b1.values(), b2.values()},
        mlp(of(dtype, activation, {w1.data(), w2.data(), b1.data(), b2.data()}, dim, expert_dim)),
        mlp_double(
            of(samples::DType::kFloat64, activation,
               {in_double[0].data(), in_double[1].data(), in_double[2].data(), in_double[3].data()},
               dim, expert_dim)) {}

  ExpertMlp of(samples::DType type, Activation activation, std::array<const void*, 4> weights,
               int64_t dim, int64_t expert_dim) const {
    return {activation,
            {type, weights[0], 3, pre_dim, dim, pre_dim * dim, dim, 1},
            {type, weights[1], 3, dim, expert_dim, dim * expert_dim, expert_dim, 1},
            weights[2],
            weights[3],
            routing.view};
  }

  Case without_biases() const {
    Case result = *this;
    result.mlp.b1 = result.mlp.b2 = result.mlp_double.b1 = result.mlp_double.b2 = nullptr;
    return result;
  }

  samples::DType dtype;
  samples::OwnedRouting routing;
  int64_t pre_dim;
  Array x, grad_y, weights, w1, w2, b1, b2;
  std::array<std::vector<double>, 4> in_double;  // w1, w2, b1, b2
  ExpertMlp mlp, mlp_double;
};

/// Gradients of a case: x, weights, w1, w2, b1, b2.
inline std::array<Array, 6> gradient_arrays(const Case& sample, samples::DType dtype) {
  const auto size = [](const std::vector<double>& values) {
    return static_cast<int64_t>(values.size());
  };
  const fomoe::Routing& routing = sample.routing.view;
  const bool has_biases = sample.mlp.b1 != nullptr;
  return {Array(dtype, routing.num_tokens * sample.mlp.dim()),
          Array(samples::accumulate_dtype(dtype), routing.num_rows()),
          Array(dtype, size(sample.in_double[0])),
          Array(dtype, size(sample.in_double[1])),
          Array(dtype, has_biases ? size(sample.in_double[2]) : 0),
          Array(dtype, has_biases ? size(sample.in_double[3]) : 0)};
}

inline fomoe::ExpertMlpGradient view(std::array<Array, 6>& arrays, bool has_biases) {
  return {arrays[0].data(),
          arrays[1].data(),
          arrays[2].data(),
          arrays[3].data(),
          has_biases ? arrays[4].data() : nullptr,
          has_biases ? arrays[5].data() : nullptr};
}

}  // namespace expert_mlp_case
