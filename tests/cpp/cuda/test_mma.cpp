// SPDX-License-Identifier: Apache-2.0
// The models of ldmatrix and mma.sync against hand-worked fragments of the PTX documentation.
#include <string>

#include "harness.h"

#include "cuda_emulation.h"

#include "cuda/mma.cuh"
#include "cuda/numeric.cuh"

namespace {

using namespace fomoe::cuda;
using fomoe::BFloat16;
using fomoe::Float16;

/// What is wrong with a kernel of one warp, or "nothing".
template <typename Kernel>
std::string defect(const Kernel& kernel) {
  try {
    fomoe::emulation::launch("kernel", 1, kWarpSize, 1024, kernel);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Four matrices; element (r, c) of matrix i is 100 i + 10 r + c.
struct Matrices {
  alignas(16) uint16_t elements[4][8][8];
};

Matrices& numbered_matrices() {
  auto& matrices = dynamic_shared<Matrices>();
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < 8; ++r) {
      for (int c = 0; c < 8; ++c) {
        matrices.elements[i][r][c] = static_cast<uint16_t>(100 * i + 10 * r + c);
      }
    }
  }
  return matrices;
}

uint32_t word(uint32_t low, uint32_t high) { return low | high << 16; }

void expect(bool condition) {
  if (!condition) fomoe::emulation::fail("wrong value");
}

template <typename T>
uint16_t bits_of(float value) {
  return fomoe::from_accumulate<T>(value).bits;
}

/// One lane's part of the product of two matrices in plain arrays.
template <typename T>
void check_product(const float (&left)[16][16], const float (&right)[16][8]) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = 2 * (lane % 4);
  const auto left_word = [&](int row, int column) {
    return word(bits_of<T>(left[row][column]), bits_of<T>(left[row][column + 1]));
  };
  const auto right_word = [&](int row) {
    return word(bits_of<T>(right[row][group]), bits_of<T>(right[row + 1][group]));
  };
  const uint32_t fragments[4] = {left_word(group, pair), left_word(group + 8, pair),
                                 left_word(group, pair + 8), left_word(group + 8, pair + 8)};
  float sums[4] = {1, 1, 1, 1};
  multiply_add<T>(sums, fragments, right_word(pair), right_word(pair + 8));
  for (int i = 0; i < 4; ++i) {
    float expected = 1;
    for (int k = 0; k < 16; ++k) expected += left[group + i / 2 * 8][k] * right[k][pair + i % 2];
    expect(sums[i] == expected);
  }
}

}  // namespace

TEST(ldmatrix_gives_a_lane_two_neighbours_of_row_lane_over_4_of_each_matrix) {
  CHECK_EQUAL(defect([] {
                const Matrices& matrices = numbered_matrices();
                const unsigned lane = threadIdx.x;
                uint32_t fragments[4];
                load_matrices<false>(fragments, matrices.elements[lane / 8][lane % 8]);
                if (lane == 0) expect(fragments[0] == word(0, 1) && fragments[3] == word(300, 301));
                if (lane == 1) expect(fragments[0] == word(2, 3));
                if (lane == 31) expect(fragments[2] == word(276, 277));
              }),
              "nothing");
}

TEST(transposed_ldmatrix_gives_a_lane_two_neighbours_of_column_lane_over_4) {
  CHECK_EQUAL(defect([] {
                const Matrices& matrices = numbered_matrices();
                const unsigned lane = threadIdx.x;
                uint32_t fragments[4];
                load_matrices<true>(fragments, matrices.elements[lane / 8][lane % 8]);
                if (lane == 0)
                  expect(fragments[0] == word(0, 10) && fragments[3] == word(300, 310));
                if (lane == 1) expect(fragments[0] == word(20, 30));
                if (lane == 31) expect(fragments[2] == word(267, 277));
              }),
              "nothing");
}

TEST(ldmatrix_refuses_rows_that_are_not_aligned) {
  CHECK(contains(defect([] {
                   uint32_t fragments[4];
                   load_matrices<false>(fragments, &numbered_matrices().elements[0][0][4]);
                 }),
                 "ldmatrix with an address that is not a multiple of 16"));
}

TEST(mma_multiplies_16_x_16_by_16_x_8) {
  const auto check = [](auto element) {
    // Small integers: exact in every type, in every order.
    float left[16][16], right[16][8];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) left[row][k] = static_cast<float>((5 * row + 3 * k) % 7);
      for (int column = 0; column < 8; ++column) {
        right[k][column] = static_cast<float>((2 * column + 11 * k) % 5 - 2);
      }
    }
    check_product<decltype(element)>(left, right);
  };
  CHECK_EQUAL(defect([&] { check(BFloat16{}); }), "nothing");
  CHECK_EQUAL(defect([&] { check(Float16{}); }), "nothing");
}

TEST(lanes_that_have_exited_are_missed) {
  CHECK(contains(defect([] {
                   float sums[4] = {};
                   const uint32_t left[4] = {};
                   if (threadIdx.x != 7) multiply_add<BFloat16>(sums, left, 0, 0);
                 }),
                 "lanes that have exited miss an instruction of the whole warp"));
}

TEST(packs_two_rounded_numbers_into_a_word_the_first_in_the_lower_half) {
  CHECK_EQUAL(pack<BFloat16>(1.0f, -2.0f), 0xc0003f80u);
  CHECK_EQUAL(pack<Float16>(1.0f, -2.0f), 0xc0003c00u);
  CHECK_EQUAL(pack<BFloat16>(1.00390625f, 1.01171875f), 0x3f823f80u);  // ties, to even
  CHECK_EQUAL(unpack<BFloat16>(0xc0003f80u).first, 1.0f);
  CHECK_EQUAL(unpack<Float16>(0xc0003c00u).second, -2.0f);
}
