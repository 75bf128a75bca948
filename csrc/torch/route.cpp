// SPDX-License-Identifier: Apache-2.0
#include "fomoe/route.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

constexpr const char* kOp = "route";

/// The arguments, checked and dense.
struct RouteArgs {
  const int32_t* ids;  // [num_slots]
  int64_t num_slots;
  int64_t top_k;
  const int32_t* expert_map;  // [num_experts]
  int64_t num_experts;
  int64_t num_local_experts;
  int64_t capacity;
};

struct RouteTables {
  int32_t* slot_to_row;
  int32_t* row_to_slot;
  int32_t* offsets;
};

/// Checks shapes and allocates; run(args, tables).
template <typename Run>
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& ids, const Tensor& expert_map,
                                         int64_t num_local_experts, std::optional<int64_t> capacity,
                                         Run run) {
  check_dtype(kOp, "ids", ids, ScalarType::Int);
  check_dtype(kOp, "expert_map", expert_map, ScalarType::Int);
  check_shape(kOp, "ids", ids, {-1, -1}, "(T, K)");
  check_shape(kOp, "expert_map", expert_map, {-1}, "(E,)");
  check(num_local_experts >= 0, "fomoe::route: num_local_experts must be at least 0, got ",
        num_local_experts);
  const int64_t most_rows = capacity.value_or(kDropless);
  check(most_rows >= 0, "fomoe::route: capacity must be at least 0, got ", most_rows);
  const int64_t num_slots = ids.size(0) * ids.size(1);
  check(num_slots <= std::numeric_limits<int32_t>::max(),
        "fomoe::route: T*K must fit in int32, got ids of shape ", shape_of(ids));

  const Tensor dense_ids = torch::stable::contiguous(ids);
  const Tensor dense_map = torch::stable::contiguous(expert_map);
  Tensor slot_to_row = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)});
  Tensor row_to_slot = torch::stable::new_empty(ids, {num_slots});
  Tensor offsets = torch::stable::new_empty(ids, {num_local_experts + 1});
  const RouteArgs args = {values_of<int32_t>(dense_ids),
                          num_slots,
                          ids.size(1),
                          values_of<int32_t>(dense_map),
                          expert_map.size(0),
                          num_local_experts,
                          most_rows};
  run(args, RouteTables{values_of<int32_t>(slot_to_row), values_of<int32_t>(row_to_slot),
                        values_of<int32_t>(offsets)});
  return {slot_to_row, row_to_slot, offsets};
}

void check_values(const RouteArgs& args) {
  const int64_t bad_slot = cpu::first_outside(args.ids, args.num_slots, -1, args.num_experts);
  check(bad_slot < 0, "fomoe::route: ids must be in [-1, ", args.num_experts, "), got ",
        bad_slot < 0 ? 0 : args.ids[bad_slot], " at slot ", bad_slot, " (token ",
        bad_slot / std::max<int64_t>(1, args.top_k), ")");
  const int64_t bad_expert =
      cpu::first_outside(args.expert_map, args.num_experts, -1, args.num_local_experts);
  check(bad_expert < 0, "fomoe::route: expert_map must be in [-1, ", args.num_local_experts,
        "), got ", bad_expert < 0 ? 0 : args.expert_map[bad_expert], " for expert ", bad_expert);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> route_cpu(const Tensor& ids, const Tensor& expert_map,
                                             int64_t num_local_experts,
                                             std::optional<int64_t> capacity) {
  return route(ids, expert_map, num_local_experts, capacity,
               [&](const RouteArgs& args, const RouteTables& tables) {
                 check_values(args);
                 Tensor workspace =
                     workspace_like(ids, cpu::route_workspace_bytes(args.num_local_experts));
                 cpu::route(args.ids, args.num_slots, args.expert_map, args.num_local_experts,
                            args.capacity, tables.slot_to_row, tables.row_to_slot, tables.offsets,
                            workspace.mutable_data_ptr());
               });
}

std::tuple<Tensor, Tensor, Tensor> route_cuda(const Tensor& ids, const Tensor& expert_map,
                                              int64_t num_local_experts,
                                              std::optional<int64_t> capacity) {
  const CudaCall call(kOp, {{"ids", ids}, {"expert_map", expert_map}});
  return route(ids, expert_map, num_local_experts, capacity,
               [&](const RouteArgs& args, const RouteTables& tables) {
                 if constexpr (kHasCudaKernels) {
                   Tensor workspace = workspace_like(
                       ids, cuda::route_workspace_bytes(args.num_slots, args.num_local_experts));
                   cuda::route(args.ids, args.num_slots, args.expert_map, args.num_experts,
                               args.num_local_experts, args.capacity, tables.slot_to_row,
                               tables.row_to_slot, tables.offsets, workspace.mutable_data_ptr(),
                               call.stream());
                 }
               });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) { m.impl("route", TORCH_BOX(&fomoe::binding::route_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("route", TORCH_BOX(&fomoe::binding::route_cuda));
}
