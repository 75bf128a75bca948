// SPDX-License-Identifier: Apache-2.0
#include "comm/plan.h"

#include <set>
#include <stdexcept>
#include <string>

namespace fomoe::comm {
namespace {

using Ids = std::vector<std::vector<int32_t>>;

void check(const Topology& topology, const Ids& ids_of_rank, int64_t top_k) {
  if (top_k < 1) {
    throw std::invalid_argument("plan: top_k must be at least 1, got " + std::to_string(top_k));
  }
  if (static_cast<int>(ids_of_rank.size()) != topology.num_ranks()) {
    throw std::invalid_argument("plan: ids must be given for " +
                                std::to_string(topology.num_ranks()) + " ranks, got " +
                                std::to_string(ids_of_rank.size()));
  }
  for (size_t rank = 0; rank < ids_of_rank.size(); ++rank) {
    const std::vector<int32_t>& ids = ids_of_rank[rank];
    if (ids.size() % top_k != 0) {
      throw std::invalid_argument("plan: ids must be " + std::to_string(top_k) +
                                  " per token, got " + std::to_string(ids.size()) + " on rank " +
                                  std::to_string(rank));
    }
    for (const int32_t id : ids) {
      if (id < -1 || id >= topology.num_experts()) {
        throw std::invalid_argument("plan: ids must be in [-1, " +
                                    std::to_string(topology.num_experts()) + "), got " +
                                    std::to_string(id) + " on rank " + std::to_string(rank));
      }
    }
  }
}

/// The ranks that own a token's experts.
class Owners {
 public:
  Owners(const Topology& topology, const Ids& ids_of_rank, int64_t top_k) {
    for (const std::vector<int32_t>& ids : ids_of_rank) {
      std::vector<std::set<int>>& tokens = of_.emplace_back(ids.size() / top_k);
      for (size_t slot = 0; slot < ids.size(); ++slot) {
        const int owner = topology.owner_of(ids[slot]);
        if (owner >= 0) tokens[slot / top_k].insert(owner);
      }
    }
  }

  int64_t num_tokens(int rank) const { return static_cast<int64_t>(of_[rank].size()); }
  const std::set<int>& of(const Row& row) const { return of_[row.rank][row.token]; }

 private:
  std::vector<std::vector<std::set<int>>> of_;  // [ranks][tokens]
};

void plan_inter_site(const Topology& topology, const Owners& owners, int rank, RankPlan& plan) {
  const int num_sites = topology.num_sites();
  plan.counts.assign(num_sites + topology.num_ranks(), 0);
  for (int site = 0; site < num_sites; ++site) {
    if (site != topology.site_of(rank)) {
      plan.inter_site.push_back({topology.gateway(rank, site), {}});
    }
  }
  for (int64_t token = 0; token < owners.num_tokens(rank); ++token) {
    std::set<int> sites;
    for (const int owner : owners.of({rank, token})) {
      ++plan.counts[num_sites + owner];
      sites.insert(topology.site_of(owner));
    }
    sites.erase(topology.site_of(rank));
    for (const int site : sites) {
      ++plan.counts[site];
      plan.inter_site[site - (site > topology.site_of(rank))].rows.push_back(token);
    }
    plan.sites.emplace_back(sites.begin(), sites.end());
    plan.held.push_back({rank, token});
  }
}

void receive_inter_site(const std::vector<RankPlan>& plans, int rank, RankPlan& receiver) {
  for (size_t source = 0; source < plans.size(); ++source) {
    for (const Message& message : plans[source].inter_site) {
      if (message.destination != rank) continue;
      for (const int64_t token : message.rows) {
        receiver.held.push_back({static_cast<int>(source), token});
      }
    }
  }
}

void plan_intra_node(const Topology& topology, const Owners& owners, int rank, RankPlan& plan) {
  const int first = topology.first_rank(topology.site_of(rank));
  for (const int member : topology.intra_node_group(rank)) plan.intra_node.push_back({member, {}});
  for (size_t held = 0; held < plan.held.size(); ++held) {
    std::vector<int>& here = plan.owners.emplace_back();
    for (const int owner : owners.of(plan.held[held])) {
      if (topology.site_of(owner) != topology.site_of(rank)) continue;
      here.push_back(owner);
      plan.intra_node[owner - first].rows.push_back(static_cast<int64_t>(held));
    }
  }
}

}  // namespace

std::vector<RankPlan> plan_all_to_all(const Topology& topology, const Ids& ids_of_rank,
                                      int64_t top_k) {
  check(topology, ids_of_rank, top_k);
  const Owners owners(topology, ids_of_rank, top_k);
  std::vector<RankPlan> plans(topology.num_ranks());
  const auto for_each_rank = [&](const auto& step) {
    for (int rank = 0; rank < topology.num_ranks(); ++rank) step(rank, plans[rank]);
  };
  for_each_rank([&](int rank, RankPlan& plan) { plan_inter_site(topology, owners, rank, plan); });
  for_each_rank([&](int rank, RankPlan& plan) { receive_inter_site(plans, rank, plan); });
  for_each_rank([&](int rank, RankPlan& plan) { plan_intra_node(topology, owners, rank, plan); });
  for_each_rank([&](int rank, RankPlan& plan) {
    for (const int sender : topology.intra_node_group(rank)) {
      for (const int64_t held : plans[sender].intra_node[topology.local_rank(rank)].rows) {
        plan.arrived.push_back(plans[sender].held[held]);
      }
    }
  });
  return plans;
}

}  // namespace fomoe::comm
