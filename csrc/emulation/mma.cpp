// SPDX-License-Identifier: Apache-2.0
#include "mma.h"

#include <cstring>

#include "asynchronous.h"
#include "counters.h"
#include "warp.h"

namespace fomoe::emulation {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

void expect_all_lanes(const Warp& warp) {
  if (warp.participants[fiber().lane] != kAllLanes) {
    fail("lanes that have exited miss an instruction of the whole warp");
  }
}

/// Element (row, column) of the matrix whose rows lanes first_lane... named.
uint32_t element(const Warp& warp, int first_lane, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, value_of<const char*>(warp, first_lane + row) + 2 * column, 2);
  return bits;
}

/// What a lane brings to an mma.
struct Operands {
  float* sums;
  const uint32_t* left;
  const uint32_t* right;
  bool is_done;
};

float half_of(uint32_t word, int half, float (*to_float)(uint16_t bits)) {
  return to_float(static_cast<uint16_t>(word >> (16 * half)));
}

/// For all lanes: with g = lane / 4 and p = 2 (lane % 4), word i of left is elements
/// (g + 8 (i % 2), p + 8 (i / 2) + {0, 1}), of right (p + 8 i + {0, 1}, g), and sums 2 i + {0, 1}
/// are (g + 8 i, p + {0, 1}). Without sanitizers: this loop is where the tests of the matrix
/// kernels spend their time.
__attribute__((no_sanitize_address, no_sanitize_undefined)) void multiply_warp(
    Operands* const (&lanes)[32], float (*to_float)(uint16_t bits)) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        left[group + i % 2 * 8][pair + i / 2 * 8 + half] =
            half_of(lanes[lane]->left[i], half, to_float);
      }
      for (int i = 0; i < 2; ++i) {
        right[pair + 8 * i + half][group] = half_of(lanes[lane]->right[i], half, to_float);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    for (int c = 0; c < 8; ++c) sums[c] = lanes[row % 8 * 4 + c / 2]->sums[row / 8 * 2 + c % 2];
    for (int k = 0; k < 16; ++k) {
      for (int c = 0; c < 8; ++c) sums[c] += left[row][k] * right[k][c];
    }
    for (int c = 0; c < 8; ++c) lanes[row % 8 * 4 + c / 2]->sums[row / 8 * 2 + c % 2] = sums[c];
  }
}

}  // namespace

void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed, const void* site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    fail("ldmatrix with an address that is not a multiple of 16");
  }
  note_access(Access::kSharedLoad, row, 16, site);
  const Warp& warp = meet_with(kAllLanes, static_cast<const char*>(row));
  expect_all_lanes(warp);
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

void store_matrices(void* row, const uint32_t (&registers)[4], const void* site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    fail("stmatrix with an address that is not a multiple of 16");
  }
  note_access(Access::kSharedStore, row, 16, site);
  asynchronous().shared.note_generic_write(row, 16);
  const std::array<uint32_t, 4> own = {registers[0], registers[1], registers[2], registers[3]};
  const Warp& warp = meet_with(kAllLanes, own);
  const int matrix = fiber().lane / 8, line = fiber().lane % 8;
  uint32_t words[4];
  for (int pair = 0; pair < 4; ++pair) {
    words[pair] = value_of<std::array<uint32_t, 4>>(warp, 4 * line + pair)[matrix];
  }
  std::memcpy(row, words, sizeof(words));
}

void multiply_matrices(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                       float (*to_float)(uint16_t bits)) {
  Operands own = {sums, left, right, false};
  const Warp& warp = meet_with(kAllLanes, &own);
  if (own.is_done) return;
  // The first lane that goes on does the work of all: the others still hold their operands.
  expect_all_lanes(warp);
  Operands* lanes[32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = value_of<Operands*>(warp, lane);
  multiply_warp(lanes, to_float);
  for (Operands* lane : lanes) lane->is_done = true;
}

}  // namespace fomoe::emulation
