// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.h"
#include "device.h"
#include "ops.h"
#include "routings.h"

namespace bench {

/// The tables of a routing where a device reaches them.
class DeviceRouting {
 public:
  DeviceRouting(Device& device, const HostRouting& host)
      : ids_(copied(device, host.ids)),
        expert_map_(copied(device, host.expert_map)),
        slot_to_row_(copied(device, host.slot_to_row)),
        row_to_slot_(copied(device, host.row_to_slot)),
        offsets_(copied(device, host.offsets)),
        num_experts_(static_cast<int64_t>(host.expert_map.size())),
        view_{indices(slot_to_row_),
              indices(row_to_slot_),
              indices(offsets_),
              host.num_tokens,
              host.top_k,
              host.num_local_experts()} {}

  const fomoe::Routing& view() const { return view_; }
  RouteArrays route_arrays() const {
    return {indices(ids_),         indices(expert_map_),    view_.num_rows(),
            num_experts_,          view_.num_local_experts, indices(slot_to_row_),
            indices(row_to_slot_), indices(offsets_)};
  }

 private:
  static int32_t* indices(const Memory& memory) { return static_cast<int32_t*>(memory.data()); }

  Memory ids_, expert_map_, slot_to_row_, row_to_slot_, offsets_;
  int64_t num_experts_;
  fomoe::Routing view_;
};

inline HostRouting draw_routing(const Arguments& arguments, const Shape& shape,
                                double ghost_share) {
  return HostRouting(draw_ids(arguments.routing, arguments.zipf_exponent, shape.tokens, shape.top_k,
                              shape.num_experts),
                     map_experts(shape.num_experts, ghost_share), shape.tokens, shape.top_k);
}

}  // namespace bench
