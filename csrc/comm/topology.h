// SPDX-License-Identifier: Apache-2.0
// Which ranks share a site, and which rank owns which expert. World ranks are numbered site by
// site.
#pragma once

#include <cstdint>
#include <vector>

namespace fomoe::comm {

class Topology {
 public:
  /// owner_of_expert: a world rank, or -1 for an expert nobody has. Throws std::invalid_argument
  /// without a site, for a site without ranks, and for an owner outside the world; the message
  /// names site or expert and value.
  Topology(std::vector<int> ranks_per_site, std::vector<int> owner_of_expert);

  int num_sites() const { return static_cast<int>(ranks_per_site_.size()); }
  int num_ranks() const { return first_rank_.back(); }
  int num_experts() const { return static_cast<int>(owner_of_expert_.size()); }
  int num_ranks(int site) const { return ranks_per_site_[site]; }
  int first_rank(int site) const { return first_rank_[site]; }
  int site_of(int rank) const { return site_of_rank_[rank]; }
  int local_rank(int rank) const { return rank - first_rank_[site_of_rank_[rank]]; }
  /// -1 for an id of -1, too.
  int owner_of(int32_t expert) const { return expert < 0 ? -1 : owner_of_expert_[expert]; }

  /// The rank of another site that takes what a rank sends there.
  int gateway(int rank, int site) const {
    return first_rank_[site] + local_rank(rank) % ranks_per_site_[site];
  }

  /// The ranks of a rank's site, ascending.
  std::vector<int> intra_node_group(int rank) const;
  /// Ranks joined by "is gateway of", directly or through others, ascending; itself alone when
  /// there is one site.
  std::vector<int> inter_site_group(int rank) const;

 private:
  std::vector<int> ranks_per_site_, owner_of_expert_;
  std::vector<int> first_rank_;    // [sites + 1]
  std::vector<int> site_of_rank_;  // [ranks]
};

}  // namespace fomoe::comm
