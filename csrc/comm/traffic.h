// SPDX-License-Identifier: Apache-2.0
// What an all-to-all moves over which kind of link, in bytes: the two stages of a plan, and the
// flat exchange they are compared with.
#pragma once

#include "comm/plan.h"

namespace fomoe::comm {

/// Bytes by link: a rank to itself, to a rank of its site, to a rank of another site.
struct LinkBytes {
  int64_t local = 0, intra_node = 0, inter_site = 0;

  void add(const Topology& topology, int source, int destination, int64_t bytes);
  bool operator==(const LinkBytes&) const = default;
};

struct Traffic {
  LinkBytes counts, dispatch, combine;
  bool operator==(const Traffic&) const = default;
};

/// What a row is made of.
struct RowFormat {
  int64_t width;          // elements
  int64_t element_bytes;  // of an element
  int64_t weight_bytes;   // of a routing weight: 4, or 8 for float64 rows
  int64_t top_k;

  /// Elements.
  int64_t combine_bytes() const { return width * element_bytes; }
  /// Elements, then top_k ids of 4 bytes, then top_k weights.
  int64_t dispatch_bytes() const { return combine_bytes() + top_k * (4 + weight_bytes); }
  /// Elements and one id: a row of the flat exchange is for one expert, and weighted at home.
  int64_t flat_dispatch_bytes() const { return combine_bytes() + 4; }
};

/// Counts are all-gathered: [sites + ranks] int64 from every rank to every rank.
Traffic hierarchical_traffic(const Topology& topology, const std::vector<RankPlan>& plans,
                             const RowFormat& format);

/// Every slot with an owner is a row of its own, sent straight to the owner and back; the counts
/// are one int64 for every pair of ranks.
Traffic flat_traffic(const Topology& topology, const std::vector<std::vector<int32_t>>& ids_of_rank,
                     const RowFormat& format);

/// The least that can cross sites both ways when a row is sent once per token and remote site:
/// elements only.
int64_t deduplicated_minimum(const std::vector<RankPlan>& plans, const RowFormat& format);

}  // namespace fomoe::comm
