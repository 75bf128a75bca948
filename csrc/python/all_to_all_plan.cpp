// SPDX-License-Identifier: Apache-2.0
// The plan of the two-stage all-to-all as plain dicts and lists.
#include "all_to_all_plan.h"

#include <pybind11/stl.h>

#include "comm/plan.h"
#include "comm/traffic.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace fomoe::comm;

py::list list_of(const std::vector<Message>& messages) {
  py::list result;
  for (const Message& message : messages) {
    result.append(py::dict("destination"_a = message.destination, "rows"_a = message.rows));
  }
  return result;
}

py::list list_of(const std::vector<Row>& rows) {
  py::list result;
  for (const Row& row : rows) result.append(py::make_tuple(row.rank, row.token));
  return result;
}

py::dict dict_of(const RankPlan& plan, const Topology& topology, int rank) {
  return py::dict("intra_node_group"_a = topology.intra_node_group(rank),
                  "inter_site_group"_a = topology.inter_site_group(rank),
                  "inter_site"_a = list_of(plan.inter_site), "held"_a = list_of(plan.held),
                  "intra_node"_a = list_of(plan.intra_node), "arrived"_a = list_of(plan.arrived),
                  "owners"_a = plan.owners, "sites"_a = plan.sites, "counts"_a = plan.counts);
}

py::dict dict_of(const LinkBytes& bytes) {
  return py::dict("local"_a = bytes.local, "intra_node"_a = bytes.intra_node,
                  "inter_site"_a = bytes.inter_site);
}

py::dict dict_of(const Traffic& traffic) {
  return py::dict("counts"_a = dict_of(traffic.counts), "dispatch"_a = dict_of(traffic.dispatch),
                  "combine"_a = dict_of(traffic.combine));
}

py::dict all_to_all_plan(const std::vector<int>& ranks_per_site, const std::vector<int>& owners,
                         const std::vector<std::vector<int32_t>>& ids, int64_t top_k, int64_t width,
                         int64_t element_bytes, int64_t weight_bytes) {
  const Topology topology(ranks_per_site, owners);
  const std::vector<RankPlan> plans = plan_all_to_all(topology, ids, top_k);
  const RowFormat format = {width, element_bytes, weight_bytes, top_k};
  py::list ranks;
  for (int rank = 0; rank < topology.num_ranks(); ++rank) {
    ranks.append(dict_of(plans[rank], topology, rank));
  }
  return py::dict("ranks"_a = ranks,
                  "hierarchical"_a = dict_of(hierarchical_traffic(topology, plans, format)),
                  "flat"_a = dict_of(flat_traffic(topology, ids, format)),
                  "deduplicated_minimum"_a = deduplicated_minimum(plans, format));
}

}  // namespace

void define_all_to_all_plan(py::module_& m) {
  m.def("all_to_all_plan", &all_to_all_plan, "ranks_per_site"_a, "owners"_a, "ids"_a, py::kw_only(),
        "top_k"_a, "width"_a, "element_bytes"_a, "weight_bytes"_a);
}
