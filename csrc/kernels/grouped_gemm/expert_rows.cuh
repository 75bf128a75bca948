// SPDX-License-Identifier: Apache-2.0
// How every CUDA kernel reads the offsets of the experts: clamped, so that wrong ones give wrong
// values, never a row outside the arrays.
#pragma once

#include "cuda/memory.cuh"

namespace fomoe::cuda {

/// Rows [begin, end) with 0 <= begin <= end <= num_rows.
struct ExpertRows {
  int64_t begin, end;
};

FOMOE_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

FOMOE_DEVICE ExpertRows rows_of(const int32_t* offsets, int64_t expert, int64_t num_rows) {
  const int64_t begin = clamp(load_global(offsets + expert), 0, num_rows);
  return {begin, clamp(load_global(offsets + expert + 1), begin, num_rows)};
}

/// The first row that no expert executes.
FOMOE_DEVICE int64_t executed_rows(const int32_t* offsets, int64_t num_experts, int64_t num_rows) {
  return clamp(load_global(offsets + num_experts), 0, num_rows);
}

}  // namespace fomoe::cuda
