// SPDX-License-Identifier: Apache-2.0
// The result of `route`, as every later op reads it.
#pragma once

#include <cstdint>

#include "fomoe/host_device.h"

namespace fomoe {

/// T tokens, K experts per token, R = T * K routed rows; slot = t * K + k.
struct Routing {
  const int32_t* slot_to_row;  // [T, K]; -1: this path is skipped (ghost, drop, missing id)
  const int32_t* row_to_slot;  // [R]; -1 past the last executed row
  const int32_t* offsets;  // [num_local_experts + 1]; rows of expert e: [offsets[e], offsets[e+1])
  int64_t num_tokens;      // T
  int64_t top_k;           // K
  int64_t num_local_experts;  // E_local

  FOMOE_HOST_DEVICE int64_t num_rows() const { return num_tokens * top_k; }
  int64_t num_executed_rows() const { return offsets[num_local_experts]; }
};

namespace cpu {
/// Index of the first value outside [low, end), or -1.
int64_t first_outside(const int32_t* values, int64_t count, int64_t low, int64_t end);

/// What makes the tensors impossible as a result of `route`, as half a sentence, or nullptr: an
/// index that would lead a kernel outside its arrays, or maps that are not inverse to each other.
const char* defect_of(const Routing& routing);

/// The same for offsets alone, where num_rows rows exist.
const char* defect_of_offsets(const int32_t* offsets, int64_t num_local_experts, int64_t num_rows);
}  // namespace cpu

}  // namespace fomoe
