// SPDX-License-Identifier: Apache-2.0
#include "all_to_all_case.h"

#include <numeric>
#include <random>
#include <utility>

namespace bench {
namespace {

using namespace fomoe::comm;

std::vector<int> equal_sites(const AllToAllShape& shape) {
  return std::vector<int>(shape.sites, static_cast<int>(shape.ranks_per_site));
}

std::vector<int> blocks(const AllToAllShape& shape) {
  const int64_t num_ranks = shape.sites * shape.ranks_per_site;
  std::vector<int> owners;
  for (int64_t expert = 0; expert < shape.experts; ++expert) {
    owners.push_back(static_cast<int>(expert * num_ranks / shape.experts));
  }
  return owners;
}

RankTokens draw(const AllToAllShape& shape, std::mt19937& random) {
  RankTokens tokens = {{}, {}, {}, shape.width, shape.top_k};
  std::vector<int32_t> experts(shape.experts);
  std::iota(experts.begin(), experts.end(), 0);
  for (int64_t token = 0; token < shape.tokens; ++token) {
    for (int64_t d = 0; d < shape.width; ++d) tokens.x.push_back(float(random() % 4));
    for (int64_t k = 0; k < shape.top_k; ++k) {
      std::swap(experts[k], experts[k + random() % (experts.size() - k)]);
      tokens.ids.push_back(experts[k]);
      tokens.weights.push_back(float(k + 1));
    }
  }
  return tokens;
}

}  // namespace

AllToAllCase::AllToAllCase(const AllToAllShape& shape)
    : topology(equal_sites(shape), blocks(shape)),
      one_site({static_cast<int>(shape.sites * shape.ranks_per_site)}, blocks(shape)) {
  std::mt19937 random(static_cast<uint32_t>(shape.seed));
  std::vector<std::vector<int32_t>> ids;
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    tokens.push_back(draw(shape, random));
    ids.push_back(tokens.back().ids);
    expected.push_back(expected_result(topology, tokens.back()));
  }
  const RowFormat format = {shape.width, 4, 4, shape.top_k};
  plans = plan_all_to_all(topology, ids, shape.top_k);
  two_stages = hierarchical_traffic(topology, plans, format);
  flat = flat_traffic(topology, ids, format);
  deduplicated_minimum = fomoe::comm::deduplicated_minimum(plans, format);
}

int64_t total_bytes(const Traffic& traffic) {
  int64_t sum = 0;
  for (const LinkBytes& bytes : {traffic.counts, traffic.dispatch, traffic.combine}) {
    sum += bytes.local + bytes.intra_node + bytes.inter_site;
  }
  return sum;
}

}  // namespace bench
