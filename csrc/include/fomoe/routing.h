// SPDX-License-Identifier: Apache-2.0
// The result of `route`, as every later op reads it.
#pragma once

#include <cstdint>

namespace fomoe {

/// T tokens, K experts per token, R = T * K routed rows; slot = t * K + k.
struct Routing {
  const int32_t* slot_to_row;  // [T, K]; -1: this path is skipped (ghost, drop, missing id)
  const int32_t* row_to_slot;  // [R]; -1 past the last executed row
  const int32_t* offsets;  // [num_local_experts + 1]; rows of expert e: [offsets[e], offsets[e+1])
  int64_t num_tokens;      // T
  int64_t top_k;           // K
  int64_t num_local_experts;  // E_local

  int64_t num_rows() const { return num_tokens * top_k; }
};

}  // namespace fomoe
