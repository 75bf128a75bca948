// SPDX-License-Identifier: Apache-2.0
// Checks that cost a pass over T*K indices, against the T*K*D elements an op then moves.
#include "fomoe/routing.h"

namespace fomoe::cpu {

int64_t first_outside(const int32_t* values, int64_t count, int64_t low, int64_t end) {
  constexpr int64_t kChunk = 4096;  // without an exit inside, the loop over a chunk vectorises
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t stop = begin + kChunk < count ? begin + kChunk : count;
    int32_t outside = 0;
    for (int64_t i = begin; i < stop; ++i) outside |= values[i] < low || values[i] >= end;
    if (!outside) continue;
    for (int64_t i = begin; i < stop; ++i) {
      if (values[i] < low || values[i] >= end) return i;
    }
  }
  return -1;
}

const char* defect_of_offsets(const int32_t* offsets, int64_t num_local_experts, int64_t num_rows) {
  if (offsets[0] != 0) return "offsets must begin with 0";
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    if (offsets[expert + 1] < offsets[expert]) return "offsets must ascend";
  }
  if (offsets[num_local_experts] > num_rows) return "offsets must end within the rows";
  return nullptr;
}

const char* defect_of(const Routing& routing) {
  const int64_t num_rows = routing.num_rows();
  const char* defect = defect_of_offsets(routing.offsets, routing.num_local_experts, num_rows);
  if (defect) return defect;
  const int64_t executed = routing.num_executed_rows();
  if (first_outside(routing.slot_to_row, num_rows, -1, executed) >= 0) {
    return "slot_to_row must be in [-1, offsets[-1])";
  }
  if (first_outside(routing.row_to_slot, executed, 0, num_rows) >= 0) {
    return "row_to_slot must be in [0, T*K) before offsets[-1]";
  }
  if (first_outside(routing.row_to_slot + executed, num_rows - executed, -1, 0) >= 0) {
    return "row_to_slot must be -1 from offsets[-1] on";
  }
  int64_t num_routed_slots = 0;
  for (int64_t slot = 0; slot < num_rows; ++slot)
    num_routed_slots += routing.slot_to_row[slot] >= 0;
  bool is_inverse = num_routed_slots == executed;
  for (int64_t row = 0; row < executed; ++row) {
    is_inverse &= routing.slot_to_row[routing.row_to_slot[row]] == row;
  }
  if (!is_inverse) return "slot_to_row and row_to_slot must be inverse to each other";
  return nullptr;
}

}  // namespace fomoe::cpu
