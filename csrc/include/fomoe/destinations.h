// SPDX-License-Identifier: Apache-2.0
// destinations: the distinct groups (ranks, sites) that own a token's experts, so that a token is
// sent to each once, however many of its experts live there.
//
// Minimum traffic: read T*K ids, write T*min(K, G) groups. Deterministic.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fomoe/cuda.h"

namespace fomoe {

/// The most groups that one token can reach.
inline int64_t num_destinations(int64_t top_k, int64_t num_groups) {
  return std::min(top_k, num_groups);
}

namespace cpu {
/// ids [num_tokens, top_k] in [-1, E), group_of_expert [E] in [-1, num_groups), -1 for an expert
/// without a group; destinations [num_tokens, min(top_k, num_groups)]: of each token the groups of
/// its experts, each once, ascending, then -1.
void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* destinations);
}  // namespace cpu

namespace cuda {
/// num_experts: length of group_of_expert. The rest as on the CPU, with the same result.
/// Throws std::invalid_argument for a top_k beyond 4096.
void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_experts, int64_t num_groups,
                  int32_t* destinations, Stream stream);
}  // namespace cuda

namespace reference {
void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_groups, int32_t* destinations);
}  // namespace reference

}  // namespace fomoe
