// SPDX-License-Identifier: Apache-2.0
// One thread; a token's groups are inserted into its row of the result, which stays sorted.
#include "fomoe/destinations.h"

namespace fomoe::cpu {

void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* destinations) {
  const int64_t width = num_destinations(top_k, num_groups);
  for (int64_t token = 0; token < num_tokens; ++token) {
    int32_t* row = destinations + token * width;
    int32_t* end = row;
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
      const int32_t group = ids[slot] < 0 ? -1 : group_of_expert[ids[slot]];
      if (group < 0) continue;
      int32_t* place = std::lower_bound(row, end, group);
      if (place != end && *place == group) continue;
      std::copy_backward(place, end, end + 1);
      *place = group;
      ++end;
    }
    std::fill(end, row + width, -1);
  }
}

}  // namespace fomoe::cpu
