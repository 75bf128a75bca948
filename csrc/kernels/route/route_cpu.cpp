// SPDX-License-Identifier: Apache-2.0
// One thread, two passes: the ids are a thousandth of the bytes that the following ops move.
#include <algorithm>

#include "fomoe/route.h"

namespace fomoe::cpu {

int64_t route_workspace_bytes(int64_t num_local_experts) {
  return num_local_experts * static_cast<int64_t>(sizeof(int32_t));
}

void route(const int32_t* ids, int64_t num_slots, const int32_t* expert_map,
           int64_t num_local_experts, int64_t capacity, int32_t* slot_to_row, int32_t* row_to_slot,
           int32_t* offsets, void* workspace) {
  std::fill_n(offsets, num_local_experts + 1, 0);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int32_t local = ids[slot] < 0 ? -1 : expert_map[ids[slot]];
    if (local >= 0) ++offsets[local + 1];
  }
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    const auto num_rows = static_cast<int32_t>(std::min<int64_t>(offsets[expert + 1], capacity));
    offsets[expert + 1] = offsets[expert] + num_rows;
  }

  int32_t* next_row = static_cast<int32_t*>(workspace);
  std::copy_n(offsets, num_local_experts, next_row);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int32_t local = ids[slot] < 0 ? -1 : expert_map[ids[slot]];
    const bool has_row = local >= 0 && next_row[local] < offsets[local + 1];
    slot_to_row[slot] = has_row ? next_row[local]++ : -1;
    if (has_row) row_to_slot[slot_to_row[slot]] = static_cast<int32_t>(slot);
  }
  std::fill(row_to_slot + offsets[num_local_experts], row_to_slot + num_slots, -1);
}

}  // namespace fomoe::cpu
