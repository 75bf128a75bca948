// SPDX-License-Identifier: Apache-2.0
// Every half, and every boundary between two of them, against arithmetic in double.
#include "fomoe/dtype.h"

#include "harness.h"

using fomoe::Float16;

namespace {

double value_of(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

Float16 half_of(double value) { return fomoe::from_accumulate<Float16>(static_cast<float>(value)); }

Float16 bits(uint32_t word) { return Float16{static_cast<uint16_t>(word)}; }

}  // namespace

TEST(every_finite_half_is_read_exactly_and_written_back) {
  for (uint32_t sign : {0x0000u, 0x8000u}) {
    for (uint32_t word = sign; word < (sign | 0x7c00u); ++word) {
      CHECK_EQUAL(fomoe::to_accumulate(bits(word)), value_of(word));
      CHECK_EQUAL(half_of(value_of(word)).bits, word);
    }
  }
}

TEST(halfway_goes_to_the_even_half_and_its_neighbours_to_the_nearest) {
  for (uint32_t word = 0; word < 0x7bffu; ++word) {
    const auto middle = static_cast<float>((value_of(word) + value_of(word + 1)) / 2);
    CHECK_EQUAL(half_of(middle).bits, (word & 1) ? word + 1 : word);
    CHECK_EQUAL(half_of(std::nextafter(middle, 0.0f)).bits, word);
    CHECK_EQUAL(half_of(std::nextafter(middle, 1e9f)).bits, word + 1);
  }
}

TEST(beyond_the_largest_half_is_infinity_and_nan_stays_nan) {
  CHECK_EQUAL(half_of(65519.99).bits, 0x7bff);
  CHECK_EQUAL(half_of(65520).bits, 0x7c00);
  CHECK_EQUAL(half_of(-1e30).bits, 0xfc00);
  CHECK_EQUAL(half_of(INFINITY).bits, 0x7c00);
  CHECK_EQUAL(half_of(1e-45).bits, 0);
  CHECK(std::isinf(fomoe::to_accumulate(bits(0xfc00))));
  for (uint32_t payload : {1u, 0x155u, 0x200u, 0x3ffu}) {
    CHECK(std::isnan(fomoe::to_accumulate(bits(0x7c00 | payload))));
    const Float16 back =
        fomoe::from_accumulate<Float16>(fomoe::to_accumulate(bits(0xfc00 | payload)));
    CHECK(std::isnan(fomoe::to_accumulate(back)));
  }
}
