// SPDX-License-Identifier: Apache-2.0
// What bench_all_to_all exchanges: tokens of all ranks from a seed, the plans, and what must come
// of it.
#pragma once

#include <cstdint>
#include <vector>

#include "all_to_all_exchange.h"
#include "comm/traffic.h"

namespace bench {

struct AllToAllShape {
  int64_t sites, ranks_per_site, tokens, experts, top_k, width, seed;
};

/// Experts are dealt out to ranks in blocks; every token has top_k different ones, all equally
/// likely. Rows are float32 of small whole numbers, so that sums are exact.
struct AllToAllCase {
  explicit AllToAllCase(const AllToAllShape& shape);

  fomoe::comm::Topology topology;
  fomoe::comm::Topology one_site;  // the same ranks as a flat exchange sees them
  std::vector<RankTokens> tokens;  // [ranks]
  std::vector<fomoe::comm::RankPlan> plans;
  std::vector<std::vector<float>> expected;
  fomoe::comm::Traffic two_stages, flat;
  int64_t deduplicated_minimum;
};

/// Over all links and phases.
int64_t total_bytes(const fomoe::comm::Traffic& traffic);

}  // namespace bench
