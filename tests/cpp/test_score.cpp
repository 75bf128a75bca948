// SPDX-License-Identifier: Apache-2.0
#include "fomoe/score.h"

#include "harness.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

long double exact_sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }

/// Error of the sigmoid in units in the last place of the exact value.
template <typename Real>
double units_off(Real x) {
  const long double expected = exact_sigmoid(x);
  const int digits = std::numeric_limits<Real>::digits - 1;
  const long double unit = std::ldexp(1.0L, std::ilogb(expected) - digits);
  return static_cast<double>(std::abs(fomoe::sigmoid(x) - expected) / unit);
}

}  // namespace

TEST(the_sigmoid_is_within_two_and_a_half_units_in_the_last_place) {
  for (double x = -87; x < 40; x += 0.000613) {
    CHECK(units_off(static_cast<float>(x)) <= 2.5);
    CHECK(units_off(x) <= 2.5);
  }
  for (double x = -708; x < -87; x += 0.0137) CHECK(units_off(x) <= 2.5);
  for (double x = 1e-40; x < 1; x *= 1.37) {
    CHECK(units_off(static_cast<float>(x)) <= 2.5 && units_off(static_cast<float>(-x)) <= 2.5);
    CHECK(units_off(x) <= 2.5 && units_off(-x) <= 2.5);
  }
}

TEST(the_sigmoid_has_these_bits_on_every_processor) {
  CHECK_EQUAL(fomoe::sigmoid(1.0f), 0x1.764d5p-1f);
  CHECK_EQUAL(fomoe::sigmoid(-3.7f), 0x1.8b4c0ep-6f);
  CHECK_EQUAL(fomoe::sigmoid(1.0), 0x1.764d4f5d5a2bdp-1);
  CHECK_EQUAL(fomoe::sigmoid(-3.7), 0x1.8b4c0ffc14fbep-6);
}

TEST(the_sigmoid_saturates_at_exactly_zero_and_one) {
  CHECK_EQUAL(fomoe::sigmoid(0.0f), 0.5f);
  CHECK_EQUAL(fomoe::sigmoid(-0.0), 0.5);
  for (float x : {17.4f, 50.0f, 87.1f, 1e30f, kInfinity}) CHECK_EQUAL(fomoe::sigmoid(x), 1.0f);
  for (double x : {37.0, 500.0, 708.1, 1e300, double{kInfinity}}) {
    CHECK_EQUAL(fomoe::sigmoid(x), 1.0);
  }
  for (float x : {-87.1f, -100.0f, -1e30f, -kInfinity}) CHECK_EQUAL(fomoe::sigmoid(x), 0.0f);
  for (double x : {-708.1, -1e300, -double{kInfinity}}) CHECK_EQUAL(fomoe::sigmoid(x), 0.0);
  CHECK(std::isnormal(fomoe::sigmoid(-87.0f)));
  CHECK(std::isnormal(fomoe::sigmoid(-708.0)));
  CHECK(std::isnan(fomoe::sigmoid(std::numeric_limits<float>::quiet_NaN())));
  CHECK(std::isnan(fomoe::sigmoid(-std::numeric_limits<double>::quiet_NaN())));
}

TEST(a_selection_score_is_the_logit_or_its_sigmoid_plus_the_bias) {
  CHECK_EQUAL(fomoe::selection_score(false, 1.5f, 0.25f), 1.75f);
  CHECK_EQUAL(fomoe::selection_score(true, 0.0f, 0.25f), 0.75f);
  CHECK_EQUAL(fomoe::selection_score(true, 40.0, -0.5), 0.5);
}

TEST(score_keys_order_as_numbers_do) {
  const std::vector<float> ascending = {NAN, -kInfinity, -2, -1e-45f, 0, 1e-45f, 3, kInfinity};
  for (size_t i = 1; i < ascending.size(); ++i) {
    CHECK(fomoe::score_key(ascending[i - 1]) < fomoe::score_key(ascending[i]));
    CHECK(fomoe::score_key(static_cast<double>(ascending[i - 1])) <
          fomoe::score_key(static_cast<double>(ascending[i])));
  }
  CHECK_EQUAL(fomoe::score_key(-0.0f), fomoe::score_key(0.0f));
  CHECK_EQUAL(fomoe::score_key(-0.0), fomoe::score_key(0.0));
}

TEST(ranks_carry_their_index_and_prefer_the_lower_one) {
  CHECK_EQUAL(fomoe::index_of<float>(fomoe::rank_of(-2.5f, 4095)), 4095);
  CHECK_EQUAL(fomoe::index_of<double>(fomoe::rank_of(2.5, 7)), 7);
  CHECK(fomoe::rank_of(1.0f, 3) > fomoe::rank_of(1.0f, 4));
  CHECK(fomoe::rank_of(1.0, 3) > fomoe::rank_of(1.0, 4));
  CHECK(fomoe::rank_of(std::nextafter(1.0f, 2.0f), 9) > fomoe::rank_of(1.0f, 0));
  CHECK(fomoe::rank_of(std::nextafter(1.0, 2.0), 9) > fomoe::rank_of(1.0, 0));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(fomoe::rank_of(nan, 4095) > fomoe::kNoRank<float>);
  CHECK(fomoe::rank_of(double{nan}, 4095) > fomoe::kNoRank<double>);
}
