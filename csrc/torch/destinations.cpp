// SPDX-License-Identifier: Apache-2.0
#include "fomoe/destinations.h"

#include <algorithm>

#include "cuda_call.h"
#include "fomoe/routing.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

constexpr const char* kOp = "destinations";

/// Checks shapes and allocates; run(dense ids, dense group_of_expert, out).
template <typename Run>
Tensor destinations(const Tensor& ids, const Tensor& group_of_expert, int64_t num_groups, Run run) {
  check_dtype(kOp, "ids", ids, ScalarType::Int);
  check_dtype(kOp, "group_of_expert", group_of_expert, ScalarType::Int);
  check_shape(kOp, "ids", ids, {-1, -1}, "(T, K)");
  check_shape(kOp, "group_of_expert", group_of_expert, {-1}, "(E,)");
  check(num_groups >= 0, "fomoe::destinations: num_groups must be at least 0, got ", num_groups);
  const Tensor dense_ids = torch::stable::contiguous(ids);
  const Tensor dense_groups = torch::stable::contiguous(group_of_expert);
  Tensor out =
      torch::stable::new_empty(ids, {ids.size(0), max_destinations(ids.size(1), num_groups)});
  run(values_of<int32_t>(dense_ids), values_of<int32_t>(dense_groups), values_of<int32_t>(out));
  return out;
}

}  // namespace

Tensor destinations_cpu(const Tensor& ids, const Tensor& group_of_expert, int64_t num_groups) {
  return destinations(
      ids, group_of_expert, num_groups,
      [&](const int32_t* dense_ids, const int32_t* groups, int32_t* out) {
        const int64_t num_experts = group_of_expert.size(0);
        const int64_t num_slots = ids.size(0) * ids.size(1);
        const int64_t bad_slot = cpu::first_outside(dense_ids, num_slots, -1, num_experts);
        check(bad_slot < 0, "fomoe::destinations: ids must be in [-1, ", num_experts, "), got ",
              bad_slot < 0 ? 0 : dense_ids[bad_slot], " at slot ", bad_slot, " (token ",
              bad_slot / std::max<int64_t>(1, ids.size(1)), ")");
        const int64_t bad_expert = cpu::first_outside(groups, num_experts, -1, num_groups);
        check(bad_expert < 0, "fomoe::destinations: group_of_expert must be in [-1, ", num_groups,
              "), got ", bad_expert < 0 ? 0 : groups[bad_expert], " for expert ", bad_expert);
        cpu::destinations(dense_ids, ids.size(0), ids.size(1), groups, num_groups, out);
      });
}

Tensor destinations_cuda(const Tensor& ids, const Tensor& group_of_expert, int64_t num_groups) {
  const CudaCall call(kOp, {{"ids", ids}, {"group_of_expert", group_of_expert}});
  return destinations(ids, group_of_expert, num_groups,
                      [&](const int32_t* dense_ids, const int32_t* groups, int32_t* out) {
                        if constexpr (kHasCudaKernels) {
                          cuda::destinations(dense_ids, ids.size(0), ids.size(1), groups,
                                             group_of_expert.size(0), num_groups, out,
                                             call.stream());
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
