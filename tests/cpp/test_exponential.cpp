// SPDX-License-Identifier: Apache-2.0
#include "fomoe/exponential.h"

#include <limits>

#include "harness.h"

TEST(exp_is_within_two_units_in_the_last_place) {
  for (double x = -87; x < 88.7; x += 0.00137) {
    const float rounded = static_cast<float>(x);
    const double expected = std::exp(static_cast<double>(rounded));
    const double unit = std::ldexp(1.0, std::ilogb(expected) - 23);
    CHECK_CLOSE(static_cast<double>(fomoe::exponential(rounded)), expected, 2 * unit);
  }
}

TEST(exp_is_exact_at_zero_and_defined_at_the_ends) {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK_EQUAL(fomoe::exponential(0.0f), 1.0f);
  CHECK_EQUAL(fomoe::exponential(-infinity), 0.0f);
  CHECK_EQUAL(fomoe::exponential(-1000.0f), 0.0f);
  CHECK_EQUAL(fomoe::exponential(infinity), infinity);
  CHECK_EQUAL(fomoe::exponential(88.8f), infinity);
  CHECK(std::isnan(fomoe::exponential(std::numeric_limits<float>::quiet_NaN())));
  CHECK(std::isnan(fomoe::exponential(-std::numeric_limits<float>::quiet_NaN())));
  CHECK(fomoe::exponential(-100.0f) > 0.0f);  // subnormal
}

TEST(the_logistic_function_has_its_limits) {
  CHECK_EQUAL(fomoe::logistic(0.0f), 0.5f);
  CHECK_EQUAL(fomoe::logistic(200.0f), 1.0f);
  CHECK_EQUAL(fomoe::logistic(-200.0f), 0.0f);
}
