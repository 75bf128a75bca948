// SPDX-License-Identifier: Apache-2.0
#include "fomoe/route.h"

#include <limits>
#include <optional>
#include <tuple>

#include "tensor_args.h"

namespace fomoe::binding {

std::tuple<Tensor, Tensor, Tensor> route_cpu(const Tensor& ids, const Tensor& expert_map,
                                             int64_t num_local_experts,
                                             std::optional<int64_t> capacity) {
  check_dtype("route", "ids", ids, ScalarType::Int);
  check_dtype("route", "expert_map", expert_map, ScalarType::Int);
  check_shape("route", "ids", ids, {-1, -1}, "(T, K)");
  check_shape("route", "expert_map", expert_map, {-1}, "(E,)");
  check(num_local_experts >= 0, "fomoe::route: num_local_experts must be at least 0, got ",
        num_local_experts);
  const int64_t most_rows = capacity.value_or(kDropless);
  check(most_rows >= 0, "fomoe::route: capacity must be at least 0, got ", most_rows);
  const int64_t num_experts = expert_map.size(0), top_k = ids.size(1);
  const int64_t num_slots = ids.size(0) * top_k;
  check(num_slots <= std::numeric_limits<int32_t>::max(),
        "fomoe::route: T*K must fit in int32, got ids of shape ", shape_of(ids));

  const Tensor dense_ids = torch::stable::contiguous(ids);
  const Tensor dense_map = torch::stable::contiguous(expert_map);
  const auto* id = values_of<int32_t>(dense_ids);
  const auto* local = values_of<int32_t>(dense_map);
  const int64_t bad_slot = cpu::first_outside(id, num_slots, -1, num_experts);
  check(bad_slot < 0, "fomoe::route: ids must be in [-1, ", num_experts, "), got ",
        bad_slot < 0 ? 0 : id[bad_slot], " at slot ", bad_slot, " (token ",
        bad_slot / std::max<int64_t>(1, top_k), ")");
  const int64_t bad_expert = cpu::first_outside(local, num_experts, -1, num_local_experts);
  check(bad_expert < 0, "fomoe::route: expert_map must be in [-1, ", num_local_experts, "), got ",
        bad_expert < 0 ? 0 : local[bad_expert], " for expert ", bad_expert);

  Tensor slot_to_row = torch::stable::new_empty(ids, {ids.size(0), top_k});
  Tensor row_to_slot = torch::stable::new_empty(ids, {num_slots});
  Tensor offsets = torch::stable::new_empty(ids, {num_local_experts + 1});
  Tensor workspace = workspace_like(ids, cpu::route_workspace_bytes(num_local_experts));
  cpu::route(id, num_slots, local, num_local_experts, most_rows, values_of<int32_t>(slot_to_row),
             values_of<int32_t>(row_to_slot), values_of<int32_t>(offsets),
             workspace.mutable_data_ptr());
  return {slot_to_row, row_to_slot, offsets};
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) { m.impl("route", TORCH_BOX(&fomoe::binding::route_cpu)); }
