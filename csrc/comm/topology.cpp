// SPDX-License-Identifier: Apache-2.0
#include "comm/topology.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace fomoe::comm {

Topology::Topology(std::vector<int> ranks_per_site, std::vector<int> owner_of_expert)
    : ranks_per_site_(std::move(ranks_per_site)),
      owner_of_expert_(std::move(owner_of_expert)),
      first_rank_{0} {
  if (ranks_per_site_.empty()) {
    throw std::invalid_argument("topology: ranks_per_site must name at least one site, got none");
  }
  for (int site = 0; site < num_sites(); ++site) {
    if (ranks_per_site_[site] < 1) {
      throw std::invalid_argument("topology: ranks_per_site must be at least 1, got " +
                                  std::to_string(ranks_per_site_[site]) + " for site " +
                                  std::to_string(site));
    }
    first_rank_.push_back(first_rank_.back() + ranks_per_site_[site]);
    site_of_rank_.insert(site_of_rank_.end(), ranks_per_site_[site], site);
  }
  for (int expert = 0; expert < num_experts(); ++expert) {
    const int owner = owner_of_expert_[expert];
    if (owner < -1 || owner >= num_ranks()) {
      throw std::invalid_argument("topology: owners must be in [-1, " +
                                  std::to_string(num_ranks()) + "), got rank " +
                                  std::to_string(owner) + " for expert " + std::to_string(expert));
    }
  }
}

std::vector<int> Topology::intra_node_group(int rank) const {
  std::vector<int> group;
  const int site = site_of(rank);
  for (int r = first_rank_[site]; r < first_rank_[site + 1]; ++r) group.push_back(r);
  return group;
}

std::vector<int> Topology::inter_site_group(int rank) const {
  std::vector<bool> is_member(num_ranks(), false);
  is_member[rank] = true;
  for (bool has_grown = true; has_grown;) {
    has_grown = false;
    for (int r = 0; r < num_ranks(); ++r) {
      for (int site = 0; site < num_sites(); ++site) {
        if (site == site_of(r)) continue;
        const int other = gateway(r, site);
        if (is_member[r] == is_member[other]) continue;
        is_member[r] = is_member[other] = has_grown = true;
      }
    }
  }
  std::vector<int> group;
  for (int r = 0; r < num_ranks(); ++r) {
    if (is_member[r]) group.push_back(r);
  }
  return group;
}

}  // namespace fomoe::comm
