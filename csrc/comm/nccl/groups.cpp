// SPDX-License-Identifier: Apache-2.0
#include "comm/nccl/groups.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fomoe::comm {
namespace {

/// First world rank of every site, and the number of ranks at the end.
std::vector<int> first_ranks(std::span<const int64_t> ranks_per_site, int rank) {
  std::vector<int> first = {0};
  for (const int64_t count : ranks_per_site) {
    if (count < 1) {
      throw std::invalid_argument("ranks_per_site: expected at least 1 rank on every site, got " +
                                  std::to_string(count) + " on site " +
                                  std::to_string(first.size() - 1));
    }
    first.push_back(first.back() + static_cast<int>(count));
  }
  if (rank < 0 || rank >= first.back()) {
    throw std::invalid_argument("rank: expected one of the " + std::to_string(first.back()) +
                                " ranks of ranks_per_site, got " + std::to_string(rank));
  }
  return first;
}

}  // namespace

std::vector<int> intra_node_group(std::span<const int64_t> ranks_per_site, int rank) {
  const std::vector<int> first = first_ranks(ranks_per_site, rank);
  const auto next = std::upper_bound(first.begin(), first.end(), rank);
  std::vector<int> group(*next - *(next - 1));
  std::iota(group.begin(), group.end(), *(next - 1));
  return group;
}

std::vector<int> inter_site_group(std::span<const int64_t> ranks_per_site, int rank) {
  const std::vector<int> first = first_ranks(ranks_per_site, rank);
  std::vector<int> component(first.back());  // named by its smallest rank
  std::iota(component.begin(), component.end(), 0);
  const auto join = [&](int left, int right) {
    const auto [low, high] = std::minmax(component[left], component[right]);
    std::replace(component.begin(), component.end(), int{high}, int{low});
  };
  for (size_t site = 0; site < ranks_per_site.size(); ++site) {
    for (size_t other = 0; other < ranks_per_site.size(); ++other) {
      for (int local = 0; other != site && local < ranks_per_site[site]; ++local) {
        join(first[site] + local, first[other] + local % static_cast<int>(ranks_per_site[other]));
      }
    }
  }
  std::vector<int> group;
  for (int other = 0; other < first.back(); ++other) {
    if (component[other] == component[rank]) group.push_back(other);
  }
  return group;
}

}  // namespace fomoe::comm
