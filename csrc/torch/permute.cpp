// SPDX-License-Identifier: Apache-2.0
#include "fomoe/permute.h"

#include "tensor_args.h"

namespace fomoe::binding {

Tensor permute_cpu(const Tensor& x, const Tensor& slot_to_row, const Tensor& row_to_slot,
                   const Tensor& offsets) {
  adopt_num_threads();
  const DType dtype = float_dtype("permute", "x", x);
  RoutingTensors holder;
  const Routing routing = routing_of("permute", slot_to_row, row_to_slot, offsets, holder);
  check_shape("permute", "x", x, {routing.num_tokens, -1}, "(T, D)");
  const Tensor dense = torch::stable::contiguous(x);
  Tensor rows = empty_result(x, {routing.num_rows(), x.size(1)});
  cpu::permute(dtype, dense.const_data_ptr(), routing, x.size(1), rows.mutable_data_ptr());
  return rows;
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("permute", TORCH_BOX(&fomoe::binding::permute_cpu));
}
