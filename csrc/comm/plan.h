// SPDX-License-Identifier: Apache-2.0
// The two-stage all-to-all of a mixture-of-experts layer, as lists: which row goes where. This is
// the specification; those who execute it find the same lists with kernels.
//
// Dispatch. Stage 1, inter-site: a rank sends a token once to its gateway in every other site that
// owns one of the token's experts. It then holds its own tokens, followed by the rows it received,
// by ascending source rank. Stage 2, intra-node: a rank sends each row it holds once to every rank
// of its site, itself included, that owns one of the row's experts; rows arrive by ascending
// sender.
//
// Combine is the way back: stage 2 reversed, where the answers to a held row are summed over
// ascending owners, so that a site is reduced before its sum crosses; then stage 1 reversed, where
// a token's own held sum is followed by those of the remote sites, ascending.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/topology.h"

namespace fomoe::comm {

/// A token, by the rank where it lives and its place there.
struct Row {
  int rank;
  int64_t token;
  bool operator==(const Row&) const = default;
};

/// Rows for one destination. Messages without rows are listed too.
struct Message {
  int destination;            // world rank
  std::vector<int64_t> rows;  // ascending: tokens in stage 1, held rows in stage 2
};

struct RankPlan {
  std::vector<Message> inter_site;       // one per other site, ascending
  std::vector<Row> held;                 // own tokens, then those received in stage 1
  std::vector<Message> intra_node;       // one per rank of the site, ascending
  std::vector<Row> arrived;              // the rows that this rank's experts execute
  std::vector<std::vector<int>> owners;  // per held row: the ranks of this site whose answers it
                                         // sums, ascending
  std::vector<std::vector<int>> sites;   // per own token: the remote sites whose sums it adds
  std::vector<int64_t> counts;           // [sites + ranks]: rows for the gateway in every site,
                                         // 0 for its own, and tokens with an expert on every rank
};

/// ids_of_rank [ranks] of [tokens * top_k] expert ids in [-1, experts). Returns one plan per rank.
/// Throws std::invalid_argument when the number of ranks, the length of the ids or an id does not
/// fit; the message names rank and value.
std::vector<RankPlan> plan_all_to_all(const Topology& topology,
                                      const std::vector<std::vector<int32_t>>& ids_of_rank,
                                      int64_t top_k);

}  // namespace fomoe::comm
