// SPDX-License-Identifier: Apache-2.0
// destinations: to which groups a token's experts belong, each group once.
//
//   out[t] = { group_of_expert[ids[t, k]] : k } without -1, ascending, then -1
//
// A group is whatever a token's row is sent to once: a site, or a rank. Minimum traffic: read T*K
// ids and E groups, write T*W indices, W = min(K, G). Deterministic.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fomoe/cuda.h"

namespace fomoe {

/// Width of the output.
inline int64_t max_destinations(int64_t top_k, int64_t num_groups) {
  return std::min(top_k, num_groups);
}

namespace cpu {
/// ids [T, K] in [-1, E), group_of_expert [E] in [-1, num_groups), out [T, W].
void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* out);
}  // namespace cpu

namespace cuda {
/// num_experts: length of group_of_expert. As on the CPU, with the same result; ids and groups out
/// of range count as -1.
void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_experts, int64_t num_groups,
                  int32_t* out, Stream stream);
}  // namespace cuda

namespace reference {
void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* out);
}  // namespace reference

}  // namespace fomoe
