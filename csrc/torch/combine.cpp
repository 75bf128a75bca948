// SPDX-License-Identifier: Apache-2.0
#include "fomoe/combine.h"

#include <optional>
#include <tuple>

#include "cuda_call.h"
#include "tensor_args.h"

namespace fomoe::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "combine";
constexpr const char* kBackward = "combine_backward";

/// Checks the weights of slots and makes them dense.
Tensor dense_weights(const char* op, const Tensor& weights, const Tensor& rows,
                     const Routing& routing) {
  check_dtype(op, "weights", weights, accumulate_type(rows.scalar_type()));
  check_shape(op, "weights", weights, {routing.num_tokens, routing.top_k}, "(T, K)");
  return torch::stable::contiguous(weights);
}

/// Checks and allocates; `run` has the parameters of cpu::combine.
template <typename Run>
Tensor combine(const Tensor& rows, OptionalTensor weights, const Tensor& slot_to_row,
               const Tensor& row_to_slot, const Tensor& offsets, Run run) {
  const DType dtype = float_dtype(kOp, "rows", rows);
  RoutingTensors holder;
  const Routing routing = routing_of(kOp, slot_to_row, row_to_slot, offsets, holder);
  check_shape(kOp, "rows", rows, {routing.num_rows(), -1}, "(T*K, D)");
  if (weights) weights = dense_weights(kOp, *weights, rows, routing);
  const Tensor dense = torch::stable::contiguous(rows);
  Tensor y = empty_result(rows, {routing.num_tokens, rows.size(1)});
  const void* weights_data = weights ? weights->const_data_ptr() : nullptr;
  run(dtype, dense.const_data_ptr(), weights_data, routing, rows.size(1), y.mutable_data_ptr());
  return y;
}

/// Checks and allocates; `run` has the parameters of cpu::combine_backward.
template <typename Run>
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_y, const Tensor& rows,
                                            const Tensor& weights, const Tensor& slot_to_row,
                                            const Tensor& row_to_slot, const Tensor& offsets,
                                            Run run) {
  const DType dtype = float_dtype(kBackward, "rows", rows);
  RoutingTensors holder;
  const Routing routing = routing_of(kBackward, slot_to_row, row_to_slot, offsets, holder);
  check_shape(kBackward, "rows", rows, {routing.num_rows(), -1}, "(T*K, D)");
  check_dtype(kBackward, "grad_y", grad_y, rows.scalar_type());
  check_shape(kBackward, "grad_y", grad_y, {routing.num_tokens, rows.size(1)}, "(T, D)");
  const Tensor slot_weights = dense_weights(kBackward, weights, rows, routing);
  const Tensor dense_grad = torch::stable::contiguous(grad_y);
  const Tensor dense_rows = torch::stable::contiguous(rows);
  Tensor d_rows = empty_result(rows, {routing.num_rows(), rows.size(1)});
  Tensor d_weights = empty_result(weights, {routing.num_tokens, routing.top_k});
  run(dtype, dense_grad.const_data_ptr(), dense_rows.const_data_ptr(),
      slot_weights.const_data_ptr(), routing, rows.size(1), d_rows.mutable_data_ptr(),
      d_weights.mutable_data_ptr());
  return {d_rows, d_weights};
}

}  // namespace

Tensor combine_cpu(const Tensor& rows, OptionalTensor weights, const Tensor& slot_to_row,
                   const Tensor& row_to_slot, const Tensor& offsets) {
  adopt_num_threads();
  return combine(
      rows, weights, slot_to_row, row_to_slot, offsets,
      [](DType dtype, const void* data, const void* factors, const Routing& routing, auto... rest) {
        check_values(kOp, routing);
        cpu::combine(dtype, data, factors, routing, rest...);
      });
}

Tensor combine_cuda(const Tensor& rows, OptionalTensor weights, const Tensor& slot_to_row,
                    const Tensor& row_to_slot, const Tensor& offsets) {
  const CudaCall call(kOp, {{"rows", rows},
                            {"weights", weights},
                            {"slot_to_row", slot_to_row},
                            {"row_to_slot", row_to_slot},
                            {"offsets", offsets}});
  return combine(rows, weights, slot_to_row, row_to_slot, offsets, [&](auto... arguments) {
    if constexpr (kHasCudaKernels) cuda::combine(arguments..., call.stream());
  });
}

std::tuple<Tensor, Tensor> combine_backward_cpu(const Tensor& grad_y, const Tensor& rows,
                                                const Tensor& weights, const Tensor& slot_to_row,
                                                const Tensor& row_to_slot, const Tensor& offsets) {
  adopt_num_threads();
  return combine_backward(grad_y, rows, weights, slot_to_row, row_to_slot, offsets,
                          [](DType dtype, const void* grad, const void* data, const void* factors,
                             const Routing& routing, auto... rest) {
                            check_values(kBackward, routing);
                            cpu::combine_backward(dtype, grad, data, factors, routing, rest...);
                          });
}

std::tuple<Tensor, Tensor> combine_backward_cuda(const Tensor& grad_y, const Tensor& rows,
                                                 const Tensor& weights, const Tensor& slot_to_row,
                                                 const Tensor& row_to_slot, const Tensor& offsets) {
  const CudaCall call(kBackward, {{"rows", rows},
                                  {"grad_y", grad_y},
                                  {"weights", weights},
                                  {"slot_to_row", slot_to_row},
                                  {"row_to_slot", row_to_slot},
                                  {"offsets", offsets}});
  return combine_backward(grad_y, rows, weights, slot_to_row, row_to_slot, offsets,
                          [&](auto... arguments) {
                            if constexpr (kHasCudaKernels)
                              cuda::combine_backward(arguments..., call.stream());
                          });
}

}  // namespace fomoe::binding

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("combine", TORCH_BOX(&fomoe::binding::combine_cpu));
  m.impl("combine_backward", TORCH_BOX(&fomoe::binding::combine_backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(fomoe, CUDA, m) {
  m.impl("combine", TORCH_BOX(&fomoe::binding::combine_cuda));
  m.impl("combine_backward", TORCH_BOX(&fomoe::binding::combine_backward_cuda));
}
