// SPDX-License-Identifier: Apache-2.0
// One rank's part in an exchange of float32 rows there and back, along a plan or flat. What an
// expert makes of a row is the row times its number plus one, so that results can be checked.
#pragma once

#include <vector>

#include "comm/plan.h"
#include "comm/transport.h"

namespace bench {

/// Tokens of one rank.
struct RankTokens {
  std::vector<float> x;        // [tokens, width]
  std::vector<int32_t> ids;    // [tokens, top_k]
  std::vector<float> weights;  // [tokens, top_k]
  int64_t width, top_k;

  int64_t count() const { return static_cast<int64_t>(ids.size()) / top_k; }
};

/// y [tokens, width], and the bytes this rank has sent, counts included.
struct Exchanged {
  std::vector<float> y;
  int64_t sent_bytes = 0;
};

/// Both stages there and back; the transport's groups are those of the topology.
Exchanged exchange_hierarchical(const fomoe::comm::Topology& topology,
                                const fomoe::comm::RankPlan& plan, const RankTokens& tokens,
                                fomoe::comm::Transport& transport);

/// Every slot straight to its owner and back; the transport's intra-node group is the world.
Exchanged exchange_flat(const fomoe::comm::Topology& topology, const RankTokens& tokens,
                        fomoe::comm::Transport& transport);

/// What both must return.
std::vector<float> expected_result(const fomoe::comm::Topology& topology, const RankTokens& tokens);

}  // namespace bench
