// SPDX-License-Identifier: Apache-2.0
#include "comm/plan.h"

#include <algorithm>
#include <stdexcept>

#include "comm/traffic.h"
#include "harness.h"
#include "plan_simulation.h"

namespace {

using namespace fomoe::comm;
using namespace plan_simulation;
using Tokens = std::vector<int64_t>;

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST(a_token_crosses_once_per_site_and_is_spread_there) {
  // Sites {0, 1} and {2, 3}; expert e is owned by rank e. Rank 1 has a token for 2 and 3, another
  // for 0 and 3; rank 2 has one for 0 and a ghost.
  const Topology topology({2, 2}, {0, 1, 2, 3, -1});
  const auto plans = plan_all_to_all(topology, {{}, {2, 3, 0, 3}, {0, 4}, {}}, 2);
  CHECK_EQUAL(plans[1].inter_site.size(), 1u);
  CHECK_EQUAL(plans[1].inter_site[0].destination, 3);
  CHECK_EQUAL(plans[1].inter_site[0].rows, (Tokens{0, 1}));
  CHECK_EQUAL(plans[1].counts, (Tokens{0, 2, 1, 0, 1, 2}));
  CHECK(plans[3].held == (std::vector<Row>{{1, 0}, {1, 1}}));
  CHECK_EQUAL(plans[3].intra_node[0].rows, (Tokens{0}));
  CHECK_EQUAL(plans[3].intra_node[1].rows, (Tokens{0, 1}));
  CHECK(plans[2].arrived == (std::vector<Row>{{1, 0}}));
  CHECK(plans[3].arrived == (std::vector<Row>{{1, 0}, {1, 1}}));
  CHECK(plans[0].arrived == (std::vector<Row>{{2, 0}, {1, 1}}));
  CHECK_EQUAL(plans[3].owners[0], (Ints{2, 3}));
  CHECK_EQUAL(plans[1].sites[1], (Ints{1}));
}

TEST(bytes_of_a_token_for_two_experts_of_a_remote_site) {
  // Rank 0 alone in its site; ranks 1 and 2 in the other own an expert each. bf16 rows of 4.
  const Topology topology({1, 2}, {1, 2});
  const Ids ids = {{0, 1}, {}, {}};
  const RowFormat format = {4, 2, 4, 2};
  const auto plans = plan_all_to_all(topology, ids, 2);
  const Traffic two_stages = hierarchical_traffic(topology, plans, format);
  CHECK(two_stages.dispatch == (LinkBytes{24, 24, 24}));  // 8 of elements, 8 of ids, 8 of weights
  CHECK(two_stages.combine == (LinkBytes{8, 8, 8}));
  CHECK(two_stages.counts == (LinkBytes{3 * 40, 2 * 40, 4 * 40}));
  const Traffic flat = flat_traffic(topology, ids, format);
  CHECK(flat.dispatch == (LinkBytes{0, 0, 2 * 12}));
  CHECK(flat.combine == (LinkBytes{0, 0, 2 * 8}));
  CHECK(flat.counts == (LinkBytes{3 * 8, 2 * 8, 4 * 8}));
  CHECK_EQUAL(deduplicated_minimum(plans, format), 16);
}

TEST(every_routed_slot_arrives_exactly_once_at_its_owner_and_comes_back) {
  for (uint32_t seed = 0; seed < 2000; ++seed) {
    const Case problem = random_case(seed);
    const Simulation simulation(problem);
    size_t num_routed = 0;
    for (int rank = 0; rank < problem.topology.num_ranks(); ++rank) {
      const auto& ids = problem.ids_of_rank[rank];
      std::vector<double> expected(ids.size() / problem.top_k, 0);
      for (size_t slot = 0; slot < ids.size(); ++slot) {
        if (problem.topology.owner_of(ids[slot]) < 0) continue;
        const int token = static_cast<int>(slot / problem.top_k);
        const int k = static_cast<int>(slot % problem.top_k);
        CHECK_EQUAL(simulation.executions().at({rank, token, k}), 1);
        expected[token] += answer(float(rank), float(token), ids[slot], weight_of(k));
        ++num_routed;
      }
      CHECK_EQUAL(simulation.result(rank), expected);
    }
    CHECK_EQUAL(simulation.executions().size(), num_routed);
  }
}

TEST(bytes_are_those_that_the_simulation_sends) {
  for (uint32_t seed = 0; seed < 2000; ++seed) {
    const Case problem = random_case(seed);
    const Simulation simulation(problem);
    const Traffic traffic =
        hierarchical_traffic(problem.topology, simulation.plans(), format_of(problem));
    CHECK(traffic == simulation.traffic());
  }
}

TEST(sizes_of_every_message_follow_from_the_counts) {
  for (uint32_t seed = 0; seed < 500; ++seed) {
    const Case problem = random_case(seed);
    const Topology& topology = problem.topology;
    const auto plans = plan_all_to_all(topology, problem.ids_of_rank, problem.top_k);
    for (int rank = 0; rank < topology.num_ranks(); ++rank) {
      const int own_site = topology.site_of(rank);
      for (const Message& message : plans[rank].inter_site) {
        CHECK_EQUAL(static_cast<int64_t>(message.rows.size()),
                    plans[rank].counts[topology.site_of(message.destination)]);
      }
      for (const Message& message : plans[rank].intra_node) {
        int64_t expected = 0;
        for (int source = 0; source < topology.num_ranks(); ++source) {
          const bool is_here = source == rank || (topology.site_of(source) != own_site &&
                                                  topology.gateway(source, own_site) == rank);
          if (is_here) {
            expected += plans[source].counts[topology.num_sites() + message.destination];
          }
        }
        CHECK_EQUAL(static_cast<int64_t>(message.rows.size()), expected);
      }
    }
  }
}

TEST(inter_site_groups_join_gateways_and_those_who_use_them) {
  CHECK_EQUAL(Topology({2, 2}, {}).inter_site_group(3), (Ints{1, 3}));
  CHECK_EQUAL(Topology({3, 1}, {}).inter_site_group(1), (Ints{0, 1, 2, 3}));
  CHECK_EQUAL(Topology({4, 2}, {}).inter_site_group(5), (Ints{1, 3, 5}));
  CHECK_EQUAL(Topology({4}, {}).inter_site_group(2), (Ints{2}));
  CHECK_EQUAL(Topology({2, 2}, {}).intra_node_group(3), (Ints{2, 3}));
}

TEST(every_message_stays_in_the_group_of_its_stage) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    const Topology topology = random_case(seed).topology;
    for (int rank = 0; rank < topology.num_ranks(); ++rank) {
      const Ints group = topology.inter_site_group(rank);
      for (int site = 0; site < topology.num_sites(); ++site) {
        if (site == topology.site_of(rank)) continue;
        CHECK(std::find(group.begin(), group.end(), topology.gateway(rank, site)) != group.end());
      }
      for (const int member : group) CHECK_EQUAL(topology.inter_site_group(member), group);
    }
  }
}

TEST(what_does_not_fit_is_refused_by_rank_and_value) {
  CHECK_EQUAL(refusal([] { Topology({}, {}); }),
              "topology: ranks_per_site must name at least one site, got none");
  CHECK_EQUAL(refusal([] { Topology({2, 0}, {}); }),
              "topology: ranks_per_site must be at least 1, got 0 for site 1");
  CHECK_EQUAL(refusal([] { Topology({2}, {0, 2}); }),
              "topology: owners must be in [-1, 2), got rank 2 for expert 1");
  const Topology topology({2}, {0, 1});
  CHECK_EQUAL(refusal([&] { plan_all_to_all(topology, {{0}}, 1); }),
              "plan: ids must be given for 2 ranks, got 1");
  CHECK_EQUAL(refusal([&] { plan_all_to_all(topology, {{0, 1}, {0}}, 2); }),
              "plan: ids must be 2 per token, got 1 on rank 1");
  CHECK_EQUAL(refusal([&] { plan_all_to_all(topology, {{0}, {2}}, 1); }),
              "plan: ids must be in [-1, 2), got 2 on rank 1");
  CHECK_EQUAL(refusal([&] { plan_all_to_all(topology, {{}, {}}, 0); }),
              "plan: top_k must be at least 1, got 0");
}
