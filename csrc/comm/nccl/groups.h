// SPDX-License-Identifier: Apache-2.0
// Who exchanges rows with whom. Sites are given by their numbers of ranks; world ranks count
// through them, site by site.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fomoe::comm {

/// World ranks of the site of `rank`, ascending.
/// Throws std::invalid_argument if a site has no rank, or no site has this rank.
std::vector<int> intra_node_group(std::span<const int64_t> ranks_per_site, int rank);

/// World ranks, ascending, that are joined with `rank` by being each other's gateways: local rank l
/// of a site has local rank l % n as its gateway in a site of n ranks. With sites of one size, the
/// same local rank of every site. Throws like intra_node_group.
std::vector<int> inter_site_group(std::span<const int64_t> ranks_per_site, int rank);

}  // namespace fomoe::comm
