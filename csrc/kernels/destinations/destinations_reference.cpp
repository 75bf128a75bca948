// SPDX-License-Identifier: Apache-2.0
#include <set>

#include "fomoe/destinations.h"

namespace fomoe::reference {

void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* out) {
  const int64_t width = max_destinations(top_k, num_groups);
  for (int64_t token = 0; token < num_tokens; ++token) {
    std::set<int32_t> groups;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t id = ids[token * top_k + k];
      if (id >= 0 && group_of_expert[id] >= 0) groups.insert(group_of_expert[id]);
    }
    auto next = groups.begin();
    for (int64_t i = 0; i < width; ++i) {
      out[token * width + i] = next == groups.end() ? -1 : *next++;
    }
  }
}

}  // namespace fomoe::reference
