// SPDX-License-Identifier: Apache-2.0
#include "fomoe/permute.h"

#include "samples.h"

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

TEST(arrays_begin_one_element_after_a_cache_line) {
  for (DType dtype : samples::kAllDTypes) {
    const auto address = reinterpret_cast<uintptr_t>(samples::Array(dtype, 3).data());
    CHECK_EQUAL(static_cast<int64_t>(address % 64), fomoe::size_of(dtype));
  }
}

TEST(every_dtype_equals_the_reference) {
  const samples::OwnedRouting routing = samples::random_routing(21, 3, 1);
  for (DType dtype : samples::kAllDTypes) {
    for (int64_t width : {1, 33}) {
      const samples::Array x(dtype, harness::random_values(21 * width, 1));
      std::vector<double> expected(63 * width);
      fomoe::reference::permute(x.values().data(), routing.view, width, expected.data());
      samples::Array rows(dtype, 63 * width);
      fomoe::cpu::permute(dtype, x.data(), routing.view, width, rows.data());
      CHECK_EQUAL(rows.values(), expected);
    }
  }
}

TEST(no_tokens_and_no_columns_do_nothing) {
  const Routing empty = {nullptr, nullptr, kOffsets.data(), 0, 2, 2};
  fomoe::cpu::permute(DType::kFloat32, nullptr, empty, 8, nullptr);
  fomoe::cpu::permute(DType::kFloat32, nullptr, kRouting, 0, nullptr);
}
