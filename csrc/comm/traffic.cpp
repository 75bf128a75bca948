// SPDX-License-Identifier: Apache-2.0
#include "comm/traffic.h"

namespace fomoe::comm {
namespace {

constexpr int64_t kCountBytes = 8;

/// Between every pair of ranks, those of a rank with itself included.
LinkBytes between_all(const Topology& topology, int64_t bytes) {
  LinkBytes result;
  for (int source = 0; source < topology.num_ranks(); ++source) {
    for (int destination = 0; destination < topology.num_ranks(); ++destination) {
      result.add(topology, source, destination, bytes);
    }
  }
  return result;
}

}  // namespace

void LinkBytes::add(const Topology& topology, int source, int destination, int64_t bytes) {
  if (source == destination) {
    local += bytes;
  } else if (topology.site_of(source) == topology.site_of(destination)) {
    intra_node += bytes;
  } else {
    inter_site += bytes;
  }
}

Traffic hierarchical_traffic(const Topology& topology, const std::vector<RankPlan>& plans,
                             const RowFormat& format) {
  Traffic traffic;
  traffic.counts =
      between_all(topology, kCountBytes * (topology.num_sites() + topology.num_ranks()));
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    for (const auto* messages : {&plans[rank].inter_site, &plans[rank].intra_node}) {
      for (const Message& message : *messages) {
        const auto rows = static_cast<int64_t>(message.rows.size());
        traffic.dispatch.add(topology, rank, message.destination, rows * format.dispatch_bytes());
        traffic.combine.add(topology, message.destination, rank, rows * format.combine_bytes());
      }
    }
  }
  return traffic;
}

Traffic flat_traffic(const Topology& topology, const std::vector<std::vector<int32_t>>& ids_of_rank,
                     const RowFormat& format) {
  Traffic traffic;
  traffic.counts = between_all(topology, kCountBytes);
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    for (const int32_t id : ids_of_rank[rank]) {
      const int owner = topology.owner_of(id);
      if (owner < 0) continue;
      traffic.dispatch.add(topology, rank, owner, format.flat_dispatch_bytes());
      traffic.combine.add(topology, owner, rank, format.combine_bytes());
    }
  }
  return traffic;
}

int64_t deduplicated_minimum(const std::vector<RankPlan>& plans, const RowFormat& format) {
  int64_t rows = 0;
  for (const RankPlan& plan : plans) {
    for (const auto& sites : plan.sites) rows += static_cast<int64_t>(sites.size());
  }
  return 2 * rows * format.combine_bytes();
}

}  // namespace fomoe::comm
