// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "fomoe/grouped_gemm.h"

namespace {

using fomoe::DType;
using fomoe::ExpertMatrices;
using fomoe::KernelPath;
using Offsets = std::vector<int32_t>;

struct Shape {
  Offsets offsets;
  int64_t num_rows, depth, cols;

  int64_t num_experts() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

std::vector<KernelPath> paths_for(DType dtype, const Shape& shape) {
  return on_device::paths_for({dtype, {}, {shape.depth, shape.cols}});
}

ExpertMatrices dense(DType dtype, const void* data, const Shape& shape, bool is_transposed) {
  const int64_t rows = is_transposed ? shape.cols : shape.depth;
  const int64_t cols = is_transposed ? shape.depth : shape.cols;
  const ExpertMatrices result = {dtype, data, shape.num_experts(), rows, cols, rows * cols,
                                 cols,  1};
  return is_transposed ? result.transposed() : result;
}

double tolerance(DType dtype, int64_t terms) {
  return 2 * samples::tolerance(dtype) +
         (dtype == DType::kFloat64 ? 2e-16 : 1e-7) * static_cast<double>(terms);
}

/// Rows, of which those past the last executed one are NaN.
std::vector<double> rows_with_tail(const Shape& shape, int64_t width, uint32_t seed) {
  std::vector<double> values = harness::random_values(shape.num_rows * width, seed);
  std::fill(values.begin() + shape.offsets.back() * width, values.end(), NAN);
  return values;
}

samples::Array grouped_gemm(KernelPath path, DType dtype, const Shape& shape, bool is_transposed,
                            const std::vector<double>& rows, const std::vector<double>& weight) {
  const on_device::Array device_rows(dtype, rows), device_weight(dtype, weight);
  const on_device::Array out(dtype, shape.num_rows * shape.cols);
  const on_device::Vector<int32_t> offsets(shape.offsets);
  const on_device::Memory workspace(
      fomoe::cuda::grouped_gemm_workspace_bytes(shape.num_rows, shape.num_experts()));
  fomoe::cuda::grouped_gemm(path, device_rows.data(), shape.num_rows,
                            dense(dtype, device_weight.data(), shape, is_transposed),
                            offsets.data(), out.data(), workspace.data(), nullptr);
  return out.host();
}

samples::Array weight_gradient(KernelPath path, DType dtype, const Shape& shape,
                               const std::vector<double>& left, const std::vector<double>& right) {
  const on_device::Array device_left(dtype, left), device_right(dtype, right);
  const on_device::Array out(dtype, shape.num_experts() * shape.depth * shape.cols);
  const on_device::Vector<int32_t> offsets(shape.offsets);
  fomoe::cuda::grouped_gemm_wgrad(path, dtype, device_left.data(), device_right.data(),
                                  shape.num_rows, offsets.data(), shape.num_experts(), shape.depth,
                                  shape.cols, out.data(), nullptr);
  return out.host();
}

void check_against_the_reference(DType dtype, const Shape& shape) {
  const std::vector<double> rows = rows_with_tail(shape, shape.depth, 1);
  const std::vector<double> grad = rows_with_tail(shape, shape.cols, 2);
  const int64_t weights = shape.num_experts() * shape.depth * shape.cols;
  const std::vector<double> weight = harness::random_values(weights, 3);
  const std::vector<double> rounded_rows = samples::Array(dtype, rows).values();
  const std::vector<double> rounded_grad = samples::Array(dtype, grad).values();
  const std::vector<double> rounded_weight = samples::Array(dtype, weight).values();
  for (const KernelPath path : paths_for(dtype, shape)) {
    for (const bool is_transposed : {false, true}) {
      std::vector<double> expected(shape.num_rows * shape.cols);
      fomoe::reference::grouped_gemm(
          rounded_rows.data(), shape.num_rows,
          dense(DType::kFloat64, rounded_weight.data(), shape, is_transposed), shape.offsets.data(),
          expected.data());
      const samples::Array out = grouped_gemm(path, dtype, shape, is_transposed, rows, weight);
      CHECK_ALL_CLOSE(out.values(), expected, tolerance(dtype, shape.depth));
      CHECK(grouped_gemm(path, dtype, shape, is_transposed, rows, weight).bytes() == out.bytes());
    }
    std::vector<double> expected(weights);
    fomoe::reference::grouped_gemm_wgrad(rounded_rows.data(), rounded_grad.data(),
                                         shape.offsets.data(), shape.num_experts(), shape.depth,
                                         shape.cols, expected.data());
    const samples::Array out = weight_gradient(path, dtype, shape, rows, grad);
    CHECK_ALL_CLOSE(out.values(), expected, tolerance(dtype, shape.offsets.back()));
    CHECK(weight_gradient(path, dtype, shape, rows, grad).bytes() == out.bytes());
  }
}

}  // namespace

TEST(every_dtype_equals_the_reference_also_transposed) {
  for (const DType dtype : samples::kAllDTypes) {
    check_against_the_reference(dtype, {{0, 2, 2, 135}, 139, 24, 40});
    check_against_the_reference(dtype, {{0, 0, 9, 11}, 11, 5, 131});
  }
}

TEST(empty_extents_give_zeros_or_nothing) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    check_against_the_reference(dtype, {{0, 0, 0}, 0, 16, 8});
    check_against_the_reference(dtype, {{0, 0, 0}, 5, 16, 8});
    check_against_the_reference(dtype, {{0, 2, 3}, 4, 0, 8});
    check_against_the_reference(dtype, {{0, 2, 3}, 4, 8, 0});
    check_against_the_reference(dtype, {{0}, 200, 8, 8});
  }
}

TEST(wrong_offsets_stay_inside_the_arrays) {
  const Shape shape = {{-3, 1000000, 5, -9}, 20, 16, 8};
  const std::vector<double> rows = harness::random_values(20 * 16, 1);
  const std::vector<double> weight = harness::random_values(3 * 16 * 8, 2);
  for (const KernelPath path : paths_for(DType::kBFloat16, shape)) {
    grouped_gemm(path, DType::kBFloat16, shape, false, rows, weight);
    weight_gradient(path, DType::kBFloat16, shape, rows, harness::random_values(20 * 8, 3));
  }
}
