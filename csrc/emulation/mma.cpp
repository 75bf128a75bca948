// SPDX-License-Identifier: Apache-2.0
#include "mma.h"

#include <cstring>

#include "counters.h"
#include "warp.h"

namespace fomoe::emulation {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

/// Element (row, column) of the matrix whose rows lanes first_lane... named.
uint32_t element(const Warp& warp, int first_lane, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, value_of<const char*>(warp, first_lane + row) + 2 * column, 2);
  return bits;
}

uint16_t half_of(uint32_t word, int half) { return static_cast<uint16_t>(word >> (16 * half)); }

}  // namespace

void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed, const void* site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    fail("ldmatrix with an address that is not a multiple of 16");
  }
  note_access(Access::kSharedLoad, row, 16, site);
  const Warp& warp = meet_with(kAllLanes, static_cast<const char*>(row));
  const int line = fiber().lane / 4, pair = fiber().lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int first = 8 * matrix;
    const uint32_t low =
        transposed ? element(warp, first, pair, line) : element(warp, first, line, pair);
    const uint32_t high =
        transposed ? element(warp, first, pair + 1, line) : element(warp, first, line, pair + 1);
    registers[matrix] = low | high << 16;
  }
}

void multiply_matrices(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                       float (*to_float)(uint16_t bits)) {
  const int group = fiber().lane / 4, member = fiber().lane % 4;
  // left[2 h + g]: row group + 8 g, columns 8 h + 2 member + {0, 1}.
  float left_rows[2][16], right_columns[2][16];
  const std::array<uint32_t, 4> own_left = {left[0], left[1], left[2], left[3]};
  const Warp& warp = meet_with(kAllLanes, own_left);
  for (int k = 0; k < 16; ++k) {
    const auto words = value_of<std::array<uint32_t, 4>>(warp, group * 4 + k % 8 / 2);
    for (int g = 0; g < 2; ++g) left_rows[g][k] = to_float(half_of(words[k / 8 * 2 + g], k % 2));
  }
  // right[h]: rows 8 h + 2 member + {0, 1}, column group.
  const std::array<uint32_t, 2> own_right = {right[0], right[1]};
  meet_with(kAllLanes, own_right);
  for (int k = 0; k < 16; ++k) {
    for (int c = 0; c < 2; ++c) {
      const int column = 2 * member + c;
      const auto words = value_of<std::array<uint32_t, 2>>(warp, column * 4 + k % 8 / 2);
      right_columns[c][k] = to_float(half_of(words[k / 8], k % 2));
    }
  }
  // sums[2 g + c]: row group + 8 g, column 2 member + c.
  for (int g = 0; g < 2; ++g) {
    for (int c = 0; c < 2; ++c) {
      for (int k = 0; k < 16; ++k) sums[2 * g + c] += left_rows[g][k] * right_columns[c][k];
    }
  }
}

}  // namespace fomoe::emulation
