// SPDX-License-Identifier: Apache-2.0
#include "fomoe/grouped_gemm.h"

#include "fomoe/rows.h"
#include "samples.h"

using fomoe::ExpertMatrices;
using samples::Array;

namespace {

const fomoe::Gemm kGemm = fomoe::reference::gemm();

void* scratch() {
  static std::vector<char> bytes(fomoe::cpu::kGemmScratchBytes, '\xff');
  return bytes.data();
}

/// A dense [num_experts, rows, cols].
ExpertMatrices dense(samples::DType dtype, const void* data, int64_t num_experts, int64_t rows,
                     int64_t cols) {
  return {dtype, data, num_experts, rows, cols, rows * cols, cols, 1};
}

}  // namespace

TEST(each_segment_meets_its_experts_matrix_and_the_tail_is_zero) {
  // Expert 0 owns row 0, expert 1 nothing, expert 2 row 1; row 2 is past the end.
  const std::vector<float> rows = {1, 2, 3, 4, NAN, NAN};
  const std::vector<float> b = {1, 0, 0, 1, NAN, NAN, NAN, NAN, 0, 10, 10, 0};
  const std::vector<int32_t> offsets = {0, 1, 1, 2};
  std::vector<float> out(6, NAN);
  fomoe::cpu::grouped_gemm(rows.data(), 3, dense(fomoe::DType::kFloat32, b.data(), 3, 2, 2),
                           offsets.data(), kGemm, out.data(), scratch());
  CHECK_EQUAL(out, (std::vector<float>{1, 2, 40, 30, 0, 0}));
}

TEST(an_expert_without_rows_has_a_zero_weight_gradient) {
  const std::vector<float> left = {2, 3, NAN}, right = {10, 100, NAN};
  const std::vector<int32_t> offsets = {0, 0, 2};
  std::vector<float> out(2, NAN);
  fomoe::cpu::grouped_gemm_wgrad(fomoe::DType::kFloat32, left.data(), right.data(), offsets.data(),
                                 2, 1, 1, kGemm, out.data(), scratch());
  CHECK_EQUAL(out, (std::vector<float>{0, 2 * 10 + 3 * 100}));
}

TEST(every_dtype_equals_the_reference_also_transposed_and_beyond_one_run) {
  const int64_t inner = 3, cols = 5, longest = fomoe::kRowsPerGemm + 9;
  const std::vector<int32_t> offsets = {0, 2, 2, static_cast<int32_t>(2 + longest)};
  const int64_t num_rows = offsets[3] + 4;
  for (samples::DType dtype : samples::kAllDTypes) {
    const Array rows(dtype, harness::random_values(num_rows * inner, 1));
    const Array weight(dtype, harness::random_values(3 * inner * cols, 2));
    const Array grad(dtype, harness::random_values(num_rows * cols, 3));
    const std::vector<double> weight_values = weight.values();
    for (bool is_transposed : {false, true}) {
      const auto b = [&](samples::DType type, const void* data) {
        return is_transposed ? dense(type, data, 3, cols, inner).transposed()
                             : dense(type, data, 3, inner, cols);
      };
      std::vector<double> expected(num_rows * cols);
      fomoe::reference::grouped_gemm(rows.values().data(), num_rows,
                                     b(samples::DType::kFloat64, weight_values.data()),
                                     offsets.data(), expected.data());
      Array out(dtype, num_rows * cols);
      fomoe::cpu::grouped_gemm(rows.data(), num_rows, b(dtype, weight.data()), offsets.data(),
                               kGemm, out.data(), scratch());
      CHECK_ALL_CLOSE(out.values(), expected, samples::tolerance(dtype));
    }
    std::vector<double> expected(3 * inner * cols);
    fomoe::reference::grouped_gemm_wgrad(rows.values().data(), grad.values().data(), offsets.data(),
                                         3, inner, cols, expected.data());
    Array out(dtype, 3 * inner * cols);
    fomoe::cpu::grouped_gemm_wgrad(dtype, rows.data(), grad.data(), offsets.data(), 3, inner, cols,
                                   kGemm, out.data(), scratch());
    CHECK_ALL_CLOSE(out.values(), expected, samples::tolerance(dtype));
  }
}

TEST(addresses_do_not_wrap_at_two_to_the_31_elements) {
  char* base = reinterpret_cast<char*>(uintptr_t{1} << 40);  // never read
  const fomoe::Rows rows = {base, fomoe::DType::kBFloat16, 7168};
  const ExpertMatrices matrices = dense(fomoe::DType::kBFloat16, base, 256, 7168, 4096);
  CHECK_EQUAL(static_cast<char*>(rows.at(400000)) - base, int64_t{400000} * 7168 * 2);
  CHECK_EQUAL(static_cast<const char*>(matrices[200].data) - base, int64_t{200} * 7168 * 4096 * 2);
}

TEST(empty_extents_give_zeros_or_nothing) {
  const std::vector<int32_t> offsets = {0, 2};
  std::vector<float> out(4, NAN);
  fomoe::cpu::grouped_gemm(nullptr, 2, dense(fomoe::DType::kFloat32, nullptr, 1, 0, 2),
                           offsets.data(), kGemm, out.data(), scratch());
  CHECK_EQUAL(out, (std::vector<float>{0, 0, 0, 0}));
  fomoe::cpu::grouped_gemm(nullptr, 0, dense(fomoe::DType::kFloat32, nullptr, 0, 2, 2),
                           offsets.data(), kGemm, nullptr, scratch());
}
