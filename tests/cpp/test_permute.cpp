// SPDX-License-Identifier: Apache-2.0
#include "fomoe/permute.h"

#include "harness.h"

using fomoe::DType;
using fomoe::Routing;

namespace {

// Two tokens, two experts each; token 0 goes to experts 1 and 0, token 1 to a ghost and expert 1.
const std::vector<int32_t> kSlotToRow = {1, 0, -1, 2};
const std::vector<int32_t> kRowToSlot = {1, 0, 3, -1};
const std::vector<int32_t> kOffsets = {0, 1, 3};
const Routing kRouting = {kSlotToRow.data(), kRowToSlot.data(), kOffsets.data(), 2, 2, 2};

}  // namespace

TEST(rows_are_grouped_by_expert_and_the_tail_is_zero) {
  const std::vector<float> x = {1, 2, 3, 4};
  std::vector<float> rows(8, NAN);
  fomoe::cpu::permute(DType::kFloat32, x.data(), kRouting, 2, rows.data());
  CHECK_EQUAL(rows, (std::vector<float>{1, 2, 1, 2, 3, 4, 0, 0}));
}

TEST(every_dtype_equals_the_reference) {
  const int64_t width = 33;
  const std::vector<double> x = harness::random_values(2 * width, 1);
  std::vector<double> expected(4 * width), actual(4 * width, NAN);
  fomoe::reference::permute(x.data(), kRouting, width, expected.data());
  fomoe::cpu::permute(DType::kFloat64, x.data(), kRouting, width, actual.data());
  CHECK_EQUAL(actual, expected);

  std::vector<fomoe::BFloat16> x_bf16(2 * width), rows_bf16(4 * width);
  for (size_t i = 0; i < x.size(); ++i) {
    x_bf16[i] = fomoe::from_accumulate<fomoe::BFloat16>(static_cast<float>(x[i]));
  }
  fomoe::cpu::permute(DType::kBFloat16, x_bf16.data(), kRouting, width, rows_bf16.data());
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto rounded = fomoe::from_accumulate<fomoe::BFloat16>(static_cast<float>(expected[i]));
    CHECK_EQUAL(rows_bf16[i].bits, rounded.bits);
  }
}

TEST(no_tokens_and_no_columns_do_nothing) {
  const Routing empty = {nullptr, nullptr, kOffsets.data(), 0, 2, 2};
  fomoe::cpu::permute(DType::kFloat32, nullptr, empty, 8, nullptr);
  fomoe::cpu::permute(DType::kFloat32, nullptr, kRouting, 0, nullptr);
}
