// SPDX-License-Identifier: Apache-2.0
#include "fomoe/destinations.h"

namespace fomoe::reference {

void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* destinations) {
  const int64_t width = num_destinations(top_k, num_groups);
  for (int64_t token = 0; token < num_tokens; ++token) {
    int64_t found = 0;
    for (int32_t group = 0; group < num_groups; ++group) {
      bool is_reached = false;
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t id = ids[token * top_k + k];
        is_reached = is_reached || (id >= 0 && group_of_expert[id] == group);
      }
      if (is_reached) destinations[token * width + found++] = group;
    }
    for (; found < width; ++found) destinations[token * width + found] = -1;
  }
}

}  // namespace fomoe::reference
