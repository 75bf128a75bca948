// SPDX-License-Identifier: Apache-2.0
#include <memory>

#include "cuda/on_device.h"
#include "expert_mlp_case.h"
#include "fomoe/expert_mlp.h"

using namespace expert_mlp_case;

namespace {

using fomoe::ExpertMlpGradient;
using fomoe::KernelPath;
using samples::DType;

/// A case's arrays on the device, each `misalignment` elements after an aligned address.
struct OnDevice {
  OnDevice(const Case& sample, int64_t misalignment)
      : sample(sample),
        routing(sample.routing.view),
        x(sample.dtype, sample.x.values(), misalignment),
        grad_y(sample.dtype, sample.grad_y.values(), misalignment),
        weights(samples::accumulate_dtype(sample.dtype), sample.weights.values(), misalignment),
        w1(sample.dtype, sample.w1.values(), misalignment),
        w2(sample.dtype, sample.w2.values(), misalignment),
        b1(sample.dtype, sample.b1.values(), misalignment),
        b2(sample.dtype, sample.b2.values(), misalignment),
        mlp(sample.mlp) {
    mlp.routing = routing.view;
    mlp.w1.data = w1.data();
    mlp.w2.data = w2.data();
    mlp.b1 = mlp.b1 ? b1.data() : nullptr;
    mlp.b2 = mlp.b2 ? b2.data() : nullptr;
  }

  const Case& sample;
  on_device::Routing routing;
  on_device::Array x, grad_y, weights, w1, w2, b1, b2;
  ExpertMlp mlp;
};

/// Of the device: x, weights, w1, w2, b1, b2.
struct Gradients {
  explicit Gradients(const Case& sample, int64_t misalignment) {
    std::array<Array, 6> sizes = gradient_arrays(sample, sample.dtype);
    for (int i = 0; i < 6; ++i) {
      const DType dtype = i == 1 ? samples::accumulate_dtype(sample.dtype) : sample.dtype;
      const auto count = static_cast<int64_t>(sizes[i].values().size());
      arrays.push_back(std::make_unique<on_device::Array>(dtype, count, misalignment));
    }
  }
  ExpertMlpGradient view(bool x, bool matrices, bool biases) const {
    const auto at = [&](int i, bool wanted) { return wanted ? arrays[i]->data() : nullptr; };
    return {at(0, x), at(1, true), at(2, matrices), at(3, matrices), at(4, biases), at(5, biases)};
  }

  std::vector<std::unique_ptr<on_device::Array>> arrays;
};

void forward(KernelPath path, const OnDevice& on_gpu, void* y, void* pre) {
  const on_device::Memory workspace(fomoe::cuda::expert_mlp_workspace_bytes(path, on_gpu.mlp));
  fomoe::cuda::expert_mlp(path, on_gpu.mlp, on_gpu.x.data(), on_gpu.weights.data(), y, pre,
                          workspace.data(), nullptr);
  on_device::synchronize();
}

void backward(KernelPath path, const OnDevice& on_gpu, const void* pre,
              const ExpertMlpGradient& gradient) {
  const on_device::Memory workspace(
      fomoe::cuda::expert_mlp_backward_workspace_bytes(path, on_gpu.mlp));
  fomoe::cuda::expert_mlp_backward(path, on_gpu.mlp, on_gpu.grad_y.data(), on_gpu.x.data(),
                                   on_gpu.weights.data(), pre, gradient, workspace.data(), nullptr);
  on_device::synchronize();
}

/// Pre-activation, hidden and output are each rounded to a 16-bit type.
double tolerance(const Case& sample) {
  const double terms = static_cast<double>(sample.mlp.dim() + sample.mlp.expert_dim());
  const double of_sums = sample.dtype == DType::kFloat64 ? 2e-16 : 1e-7;
  return samples::tolerance(sample.dtype) * 4 + of_sums * terms;
}

void check_against_the_reference(KernelPath path, const Case& sample, int64_t misalignment = 0) {
  const int64_t tokens = sample.routing.view.num_tokens, rows = sample.routing.view.num_rows();
  const int64_t dim = sample.mlp.dim();
  const bool has_biases = sample.mlp.b1 != nullptr;
  std::vector<double> y_expected(tokens * dim), pre_expected(rows * sample.pre_dim);
  fomoe::reference::expert_mlp(sample.mlp_double, sample.x.values().data(),
                               sample.weights.values().data(), y_expected.data(),
                               pre_expected.data());
  std::array<Array, 6> expected = gradient_arrays(sample, DType::kFloat64);
  fomoe::reference::expert_mlp_backward(sample.mlp_double, sample.grad_y.values().data(),
                                        sample.x.values().data(), sample.weights.values().data(),
                                        view(expected, has_biases));

  const OnDevice on_gpu(sample, misalignment);
  const on_device::Array y(sample.dtype, tokens * dim, misalignment);
  const on_device::Array pre(sample.dtype, rows * sample.pre_dim, misalignment);
  forward(path, on_gpu, y.data(), pre.data());
  CHECK_ALL_CLOSE(y.values(), y_expected, tolerance(sample));
  CHECK_ALL_CLOSE(pre.values(), pre_expected, tolerance(sample));
  const on_device::Array y_alone(sample.dtype, tokens * dim, misalignment);
  forward(path, on_gpu, y_alone.data(), nullptr);
  CHECK(y_alone.host().bytes() == y.host().bytes());

  const Gradients actual(sample, misalignment);
  backward(path, on_gpu, pre.data(), actual.view(true, true, has_biases));
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK_ALL_CLOSE(actual.arrays[i]->values(), expected[i].values(), tolerance(sample));
  }
}

std::vector<KernelPath> paths_for(const Case& sample) {
  return on_device::paths_for(
      {sample.dtype, {}, {sample.mlp.dim(), sample.mlp.expert_dim(), sample.pre_dim}});
}

void check_on_every_path(const Case& sample) {
  for (const KernelPath path : paths_for(sample)) check_against_the_reference(path, sample);
}

}  // namespace

TEST(every_dtype_and_activation_equals_the_reference) {
  for (const DType dtype : samples::kAllDTypes) {
    for (const Activation activation : kActivations) {
      const Case sample(dtype, activation, 13, 3, 16, 24);
      check_on_every_path(activation == Activation::kSilu ? sample.without_biases() : sample);
    }
  }
}

TEST(odd_sizes_and_alignments_equal_the_reference) {
  for (const DType dtype : samples::kAllDTypes) {
    const Case sample(dtype, Activation::kSwiglu, 13, 3, 5, 7);
    check_against_the_reference(KernelPath::kSimple, sample, 1);
  }
}

TEST(few_tokens_equal_the_reference) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const Case sample(dtype, Activation::kSwiglu, 5, 3, 40, 24);
    check_against_the_reference(KernelPath::kSm80, sample);
    const Case one_token(dtype, Activation::kSilu, 1, 2, 40, 24);
    check_against_the_reference(KernelPath::kSm80, one_token.without_biases());
  }
}

TEST(experts_with_more_rows_and_columns_than_one_tile_equal_the_reference) {
  check_on_every_path(Case(DType::kBFloat16, Activation::kSwiglu, 150, 3, 24, 136));
}

TEST(one_expert_with_every_row_equals_the_reference) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const std::vector<int32_t> ids(140, 1);
    check_on_every_path(
        Case(dtype, Activation::kSwiglu, samples::OwnedRouting(ids, 1, {-1, 1, 2, 0}, 3), 16, 8));
  }
}

TEST(skipped_paths_give_zeros) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const std::vector<int32_t> ids(6, -1);
    check_on_every_path(
        Case(dtype, Activation::kSwiglu, samples::OwnedRouting(ids, 2, {0, 1, 2}, 3), 16, 8));
  }
}

TEST(no_tokens_give_zero_weight_gradients) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    check_on_every_path(Case(dtype, Activation::kSwiglu, 0, 2, 16, 8));
  }
}

TEST(gradients_that_nobody_wants_change_no_others) {
  const Case sample(DType::kBFloat16, Activation::kSwiglu, 13, 3, 16, 24);
  const KernelPath path = KernelPath::kSm80;
  const OnDevice on_gpu(sample, 0);
  const int64_t rows = sample.routing.view.num_rows();
  const on_device::Array y(sample.dtype, sample.routing.view.num_tokens * sample.mlp.dim());
  const on_device::Array pre(sample.dtype, rows * sample.pre_dim);
  forward(path, on_gpu, y.data(), pre.data());
  const Gradients all(sample, 0), unwritten(sample, 0);
  backward(path, on_gpu, pre.data(), all.view(true, true, true));
  for (int wanted = 0; wanted < 8; ++wanted) {
    const bool is_wanted[] = {(wanted & 1) != 0, true,
                              (wanted & 2) != 0, (wanted & 2) != 0,
                              (wanted & 4) != 0, (wanted & 4) != 0};
    const Gradients some(sample, 0);
    backward(path, on_gpu, pre.data(), some.view(is_wanted[0], is_wanted[2], is_wanted[4]));
    for (int i = 0; i < 6; ++i) {
      const Gradients& expected = is_wanted[i] ? all : unwritten;
      CHECK(some.arrays[i]->host().bytes() == expected.arrays[i]->host().bytes());
    }
  }
}

TEST(what_the_backward_keeps_is_smaller_than_its_parts_together) {
  // Qwen3-30B, 32768 tokens: d_pre and d_x live at the same time; hidden is gone by then.
  const fomoe::Routing routing = {nullptr, nullptr, nullptr, 32768, 8, 128};
  const DType bf16 = DType::kBFloat16;
  const ExpertMlp mlp = {Activation::kSwiglu,
                         {bf16, nullptr, 128, 1536, 2048, 1536 * 2048, 2048, 1},
                         {bf16, nullptr, 128, 2048, 768, 2048 * 768, 768, 1},
                         nullptr,
                         nullptr,
                         routing};
  const int64_t rows = routing.num_rows(), mebibyte = 1 << 20;
  CHECK(fomoe::cuda::expert_mlp_workspace_bytes(KernelPath::kSm80, mlp) <
        rows * (768 + 2048) * 2 + mebibyte);
  CHECK(fomoe::cuda::expert_mlp_backward_workspace_bytes(KernelPath::kSm80, mlp) <
        rows * (1536 + 2048) * 2 + mebibyte);
}
