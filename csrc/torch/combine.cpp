// SPDX-License-Identifier: Apache-2.0
#include "fomoe/combine.h"

#include <optional>
#include <tuple>

#include "tensor_args.h"

namespace fomoe::binding {
namespace {

/// Checks the weights of slots and makes them dense.
Tensor dense_weights(const char* op, const Tensor& weights, const Tensor& rows,
                     const Routing& routing) {
  check_dtype(op, "weights", weights, accumulate_type(rows.scalar_type()));
  check_shape(op, "weights", weights, {routing.num_tokens, routing.top_k}, "(T, K)");
  return torch::stable::contiguous(weights);
}

}  // namespace

Tensor combine_cpu(const Tensor& rows, std::optional<Tensor> weights, const Tensor& slot_to_row,
                   const Tensor& row_to_slot, const Tensor& offsets) {
  adopt_num_threads();
  const DType dtype = float_dtype("combine", "rows", rows);
  RoutingTensors holder;
  const Routing routing = routing_of("combine", slot_to_row, row_to_slot, offsets, holder);
  check_shape("combine", "rows", rows, {routing.num_rows(), -1}, "(T*K, D)");
  if (weights) weights = dense_weights("combine", *weights, rows, routing);
  const Tensor dense = torch::stable::contiguous(rows);
  Tensor y = empty_result(rows, {routing.num_tokens, rows.size(1)});
  cpu::combine(dtype, dense.const_data_ptr(), weights ? weights->const_data_ptr() : nullptr,
               routing, rows.size(1), y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> combine_backward_cpu(const Tensor& grad_y, const Tensor& rows,
                                                const Tensor& weights, const Tensor& slot_to_row,
                                                const Tensor& row_to_slot, const Tensor& offsets) {
  const char* op = "combine_backward";
  adopt_num_threads();
  const DType dtype = float_dtype(op, "rows", rows);
  RoutingTensors holder;
  const Routing routing = routing_of(op, slot_to_row, row_to_slot, offsets, holder);
  check_shape(op, "rows", rows, {routing.num_rows(), -1}, "(T*K, D)");
  check_dtype(op, "grad_y", grad_y, rows.scalar_type());
  check_shape(op, "grad_y", grad_y, {routing.num_tokens, rows.size(1)}, "(T, D)");
  const Tensor slot_weights = dense_weights(op, weights, rows, routing);
  const Tensor dense_grad = torch::stable::contiguous(grad_y);
  const Tensor dense_rows = torch::stable::contiguous(rows);
  Tensor d_rows = empty_result(rows, {routing.num_rows(), rows.size(1)});
  Tensor d_weights = empty_result(weights, {routing.num_tokens, routing.top_k});
  cpu::combine_backward(dtype, dense_grad.const_data_ptr(), dense_rows.const_data_ptr(),
                        slot_weights.const_data_ptr(), routing, rows.size(1),
                        d_rows.mutable_data_ptr(), d_weights.mutable_data_ptr());
  return {d_rows, d_weights};
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("combine", TORCH_BOX(&fomoe::binding::combine_cpu));
  m.impl("combine_backward", TORCH_BOX(&fomoe::binding::combine_backward_cpu));
}
