// SPDX-License-Identifier: Apache-2.0
#include "fomoe/destinations.h"

#include <limits>

#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

constexpr const char* kOp = "destinations";

/// The arguments, checked and dense.
struct DestinationsArgs {
  const int32_t* ids;  // [num_tokens, top_k]
  int64_t num_tokens;
  int64_t top_k;
  const int32_t* group_of_expert;  // [num_experts]
  int64_t num_experts;
  int64_t num_groups;
};

/// Checks shapes and allocates; run(args, result).
template <typename Run>
Tensor destinations(const Tensor& ids, const Tensor& group_of_expert, int64_t num_groups, Run run) {
  check_dtype(kOp, "ids", ids, ScalarType::Int);
  check_dtype(kOp, "group_of_expert", group_of_expert, ScalarType::Int);
  check_shape(kOp, "ids", ids, {-1, -1}, "(T, K)");
  check_shape(kOp, "group_of_expert", group_of_expert, {-1}, "(E,)");
  check(num_groups >= 0, "fomoe::destinations: num_groups must be at least 0, got ", num_groups);
  check(ids.size(0) * ids.size(1) <= std::numeric_limits<int32_t>::max(),
        "fomoe::destinations: T*K must fit in int32, got ids of shape ", shape_of(ids));

  const Tensor dense_ids = torch::stable::contiguous(ids);
  const Tensor dense_groups = torch::stable::contiguous(group_of_expert);
  Tensor result =
      torch::stable::new_empty(ids, {ids.size(0), num_destinations(ids.size(1), num_groups)});
  run(DestinationsArgs{values_of<int32_t>(dense_ids), ids.size(0), ids.size(1),
                       values_of<int32_t>(dense_groups), group_of_expert.size(0), num_groups},
      values_of<int32_t>(result));
  return result;
}

void check_values(const DestinationsArgs& args) {
  const int64_t bad_slot =
      cpu::first_outside(args.ids, args.num_tokens * args.top_k, -1, args.num_experts);
  check(bad_slot < 0, "fomoe::destinations: ids must be in [-1, ", args.num_experts, "), got ",
        bad_slot < 0 ? 0 : args.ids[bad_slot], " at slot ", bad_slot, " (token ",
        bad_slot / std::max<int64_t>(1, args.top_k), ")");
  const int64_t bad_expert =
      cpu::first_outside(args.group_of_expert, args.num_experts, -1, args.num_groups);
  check(bad_expert < 0, "fomoe::destinations: group_of_expert must be in [-1, ", args.num_groups,
        "), got ", bad_expert < 0 ? 0 : args.group_of_expert[bad_expert], " for expert ",
        bad_expert);
}

}  // namespace

Tensor destinations_cpu(const Tensor& ids, const Tensor& group_of_expert, int64_t num_groups) {
  return destinations(ids, group_of_expert, num_groups,
                      [](const DestinationsArgs& args, int32_t* result) {
                        check_values(args);
                        cpu::destinations(args.ids, args.num_tokens, args.top_k,
                                          args.group_of_expert, args.num_groups, result);
                      });
}

Tensor destinations_cuda(const Tensor& ids, const Tensor& group_of_expert, int64_t num_groups) {
  const CudaCall call(kOp, {{"ids", ids}, {"group_of_expert", group_of_expert}});
  return destinations(
      ids, group_of_expert, num_groups, [&](const DestinationsArgs& args, int32_t* result) {
        if constexpr (kHasCudaKernels) {
          cuda::destinations(args.ids, args.num_tokens, args.top_k, args.group_of_expert,
                             args.num_experts, args.num_groups, result, call.stream());
        }
      });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("destinations", TORCH_BOX(&fomoe::binding::destinations_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("destinations", TORCH_BOX(&fomoe::binding::destinations_cuda));
}
