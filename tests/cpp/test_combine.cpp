// SPDX-License-Identifier: Apache-2.0
#include "fomoe/combine.h"

#include "samples.h"

using samples::Array;

namespace {

// Two tokens, two experts each; token 0 goes to experts 1 and 0, token 1 to a ghost and expert 1.
const std::vector<int32_t> kSlotToRow = {1, 0, -1, 2};
const std::vector<int32_t> kRowToSlot = {1, 0, 3, -1};
const std::vector<int32_t> kOffsets = {0, 1, 3};
const fomoe::Routing kRouting = {kSlotToRow.data(), kRowToSlot.data(), kOffsets.data(), 2, 2, 2};

}  // namespace

TEST(a_token_is_the_weighted_sum_of_its_rows) {
  const std::vector<float> rows = {1, 2, 3, NAN}, weights = {10, 100, NAN, 2};
  std::vector<float> y(2, NAN);
  fomoe::cpu::combine(fomoe::DType::kFloat32, rows.data(), weights.data(), kRouting, 1, y.data());
  CHECK_EQUAL(y, (std::vector<float>{10 * 2 + 100 * 1, 2 * 3}));
  fomoe::cpu::combine(fomoe::DType::kFloat32, rows.data(), nullptr, kRouting, 1, y.data());
  CHECK_EQUAL(y, (std::vector<float>{3, 3}));
}

TEST(the_backward_scales_the_gradient_and_dots_it_with_the_row) {
  const std::vector<float> grad_y = {5, 7}, rows = {1, 2, 3, NAN}, weights = {10, 100, NAN, 2};
  std::vector<float> d_rows(4, NAN), d_weights(4, NAN);
  fomoe::cpu::combine_backward(fomoe::DType::kFloat32, grad_y.data(), rows.data(), weights.data(),
                               kRouting, 1, d_rows.data(), d_weights.data());
  CHECK_EQUAL(d_rows, (std::vector<float>{500, 50, 14, 0}));
  CHECK_EQUAL(d_weights, (std::vector<float>{10, 5, 0, 21}));
}

TEST(a_slot_that_no_row_points_back_to_gets_a_zero_gradient) {
  // Slot 2 shares row 2 with slot 3. The bindings refuse this; the kernel still writes everything.
  const std::vector<int32_t> slot_to_row = {1, 0, 2, 2};
  const fomoe::Routing routing = {slot_to_row.data(), kRowToSlot.data(), kOffsets.data(), 2, 2, 2};
  const std::vector<float> grad_y = {5, 7}, rows = {1, 2, 3, NAN}, weights = {10, 100, 1, 2};
  std::vector<float> d_rows(4, NAN), d_weights(4, NAN);
  fomoe::cpu::combine_backward(fomoe::DType::kFloat32, grad_y.data(), rows.data(), weights.data(),
                               routing, 1, d_rows.data(), d_weights.data());
  CHECK_EQUAL(d_weights, (std::vector<float>{10, 5, 0, 21}));
}

TEST(every_dtype_and_width_equals_the_reference) {
  const samples::OwnedRouting routing = samples::random_routing(21, 3, 1);
  const int64_t num_tokens = 21, num_rows = 63;
  for (samples::DType dtype : samples::kAllDTypes) {
    for (int64_t width : {1, 15, 33, 1030}) {
      const Array rows(dtype, harness::random_values(num_rows * width, 1));
      const Array grad_y(dtype, harness::random_values(num_tokens * width, 2));
      const Array weights(samples::accumulate_dtype(dtype), harness::random_values(num_rows, 3));
      std::vector<double> y_expected(num_tokens * width), d_rows_expected(num_rows * width),
          d_weights_expected(num_rows);
      fomoe::reference::combine(rows.values().data(), weights.values().data(), routing.view, width,
                                y_expected.data());
      fomoe::reference::combine_backward(grad_y.values().data(), rows.values().data(),
                                         weights.values().data(), routing.view, width,
                                         d_rows_expected.data(), d_weights_expected.data());

      Array y(dtype, num_tokens * width), d_rows(dtype, num_rows * width),
          d_weights(samples::accumulate_dtype(dtype), num_rows);
      fomoe::cpu::combine(dtype, rows.data(), weights.data(), routing.view, width, y.data());
      fomoe::cpu::combine_backward(dtype, grad_y.data(), rows.data(), weights.data(), routing.view,
                                   width, d_rows.data(), d_weights.data());
      CHECK_ALL_CLOSE(y.values(), y_expected, samples::tolerance(dtype));
      CHECK_ALL_CLOSE(d_rows.values(), d_rows_expected, samples::tolerance(dtype));
      CHECK_ALL_CLOSE(d_weights.values(), d_weights_expected,
                      samples::tolerance(samples::accumulate_dtype(dtype)));
    }
  }
}

TEST(no_tokens_do_nothing) {
  const fomoe::Routing empty = {nullptr, nullptr, kOffsets.data(), 0, 2, 0};
  fomoe::cpu::combine(fomoe::DType::kFloat32, nullptr, nullptr, empty, 8, nullptr);
  fomoe::cpu::combine_backward(fomoe::DType::kFloat32, nullptr, nullptr, nullptr, empty, 8, nullptr,
                               nullptr);
}
