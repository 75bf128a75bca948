// SPDX-License-Identifier: Apache-2.0
// Choices of experts as traffic may bring them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "fomoe/routing.h"

namespace bench {

enum class RoutingKind {
  kUniform,   // K different experts, all equally likely
  kBalanced,  // each expert gets the same number of slots, up to one
  kZipf,      // K different experts, the n-th with weight n^-exponent
  kOneHot,    // every slot goes to one expert
  kEmpty,     // as kUniform, but among every other expert: half of them get nothing
};

const std::map<std::string, RoutingKind>& routing_kinds();
const char* name_of(RoutingKind kind);

/// Throws UsageError where a token cannot get K experts.
void check_routing(RoutingKind kind, int64_t num_experts, int64_t top_k);

/// ids [T, K].
std::vector<int32_t> draw_ids(RoutingKind kind, double zipf_exponent, int64_t num_tokens,
                              int64_t top_k, int64_t num_experts);

/// Of E experts, the ghosts spread evenly among them: [E] local index or -1.
std::vector<int32_t> map_experts(int64_t num_experts, double ghost_share);

/// The result of `route` on the host.
struct HostRouting {
  HostRouting(std::vector<int32_t> ids, std::vector<int32_t> expert_map, int64_t num_tokens,
              int64_t top_k);

  int64_t num_executed_rows() const { return offsets.back(); }
  int64_t num_active_experts() const;  // those with rows
  int64_t num_local_experts() const { return static_cast<int64_t>(offsets.size()) - 1; }

  std::vector<int32_t> ids, expert_map, slot_to_row, row_to_slot, offsets;
  int64_t num_tokens, top_k;
};

}  // namespace bench
