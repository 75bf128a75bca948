// SPDX-License-Identifier: Apache-2.0
#include "distinct_groups.h"
#include "fomoe/destinations.h"

namespace fomoe::cpu {

void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* out) {
  const int64_t width = max_destinations(top_k, num_groups);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t* chosen = ids + token * top_k;
    int32_t* groups = out + token * width;
    store_distinct_groups(
        top_k, num_groups, width,
        [&](int64_t k) { return chosen[k] < 0 ? -1 : group_of_expert[chosen[k]]; },
        [&](int64_t i, int32_t group) { groups[i] = group; });
  }
}

}  // namespace fomoe::cpu
