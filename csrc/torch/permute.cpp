// SPDX-License-Identifier: Apache-2.0
#include "fomoe/permute.h"

#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

constexpr const char* kOp = "permute";

/// Checks and allocates; `run` has the parameters of cpu::permute.
template <typename Run>
Tensor permute(const Tensor& x, const Tensor& slot_to_row, const Tensor& row_to_slot,
               const Tensor& offsets, Run run) {
  const DType dtype = float_dtype(kOp, "x", x);
  RoutingTensors holder;
  const Routing routing = routing_of(kOp, slot_to_row, row_to_slot, offsets, holder);
  check_shape(kOp, "x", x, {routing.num_tokens, -1}, "(T, D)");
  const Tensor dense = torch::stable::contiguous(x);
  Tensor rows = empty_result(x, {routing.num_rows(), x.size(1)});
  run(dtype, dense.const_data_ptr(), routing, x.size(1), rows.mutable_data_ptr());
  return rows;
}

}  // namespace

Tensor permute_cpu(const Tensor& x, const Tensor& slot_to_row, const Tensor& row_to_slot,
                   const Tensor& offsets) {
  adopt_num_threads();
  return permute(x, slot_to_row, row_to_slot, offsets,
                 [](DType dtype, const void* data, const Routing& routing, auto... rest) {
                   check_values(kOp, routing);
                   cpu::permute(dtype, data, routing, rest...);
                 });
}

Tensor permute_cuda(const Tensor& x, const Tensor& slot_to_row, const Tensor& row_to_slot,
                    const Tensor& offsets) {
  const CudaCall call(
      kOp,
      {{"x", x}, {"slot_to_row", slot_to_row}, {"row_to_slot", row_to_slot}, {"offsets", offsets}});
  return permute(x, slot_to_row, row_to_slot, offsets, [&](auto... arguments) {
    if constexpr (kHasCudaKernels) cuda::permute(arguments..., call.stream());
  });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("permute", TORCH_BOX(&fomoe::binding::permute_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("permute", TORCH_BOX(&fomoe::binding::permute_cuda));
}
