// SPDX-License-Identifier: Apache-2.0
#include "fomoe/route.h"

namespace fomoe::reference {

void route(const int32_t* ids, int64_t num_slots, const int32_t* expert_map,
           int64_t num_local_experts, int64_t capacity, int32_t* slot_to_row, int32_t* row_to_slot,
           int32_t* offsets) {
  int32_t row = 0;
  for (int64_t slot = 0; slot < num_slots; ++slot) slot_to_row[slot] = -1;
  for (int64_t expert = 0; expert < num_local_experts; ++expert) {
    offsets[expert] = row;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (ids[slot] < 0 || expert_map[ids[slot]] != expert) continue;
      if (row - offsets[expert] >= capacity) continue;
      slot_to_row[slot] = row;
      row_to_slot[row++] = static_cast<int32_t>(slot);
    }
  }
  offsets[num_local_experts] = row;
  for (; row < num_slots; ++row) row_to_slot[row] = -1;
}

}  // namespace fomoe::reference
