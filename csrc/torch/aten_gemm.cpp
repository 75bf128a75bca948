// SPDX-License-Identifier: Apache-2.0
#include "aten_gemm.h"

#include <array>

#include "tensor_args.h"

namespace fomoe::binding {
namespace {

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
  }
  return ScalarType::Float;
}

Tensor tensor_over(const Matrix& matrix, DType dtype) {
  static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  // A tensor has no const data; mm.out only reads its operands.
  return torch::stable::from_blob(const_cast<void*>(matrix.data), {matrix.rows, matrix.cols},
                                  {matrix.row_stride, matrix.col_stride}, cpu,
                                  scalar_type_of(dtype));
}

void mm_out(const Tensor& a, const Tensor& b, const Tensor& c) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack = {from(a), from(b), from(c)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference to c, to drop it
}

void multiply(void*, DType dtype, const Matrix& a, const Matrix& b, const DenseMatrix& c) {
  const Tensor left = tensor_over(a, dtype), right = tensor_over(b, dtype);
  Tensor product = tensor_over(c.view(), dtype);
  if (dtype != DType::kFloat16) return mm_out(left, right, product);
  // Where the processor has no float16 arithmetic, torch's own product is some five times slower
  // than widening the operands; and this way the result does not depend on the processor.
  using torch::stable::to;
  Tensor wide = torch::stable::new_empty(product, {c.rows, c.cols}, ScalarType::Float);
  mm_out(to(left, ScalarType::Float), to(right, ScalarType::Float), wide);
  torch::stable::copy_(product, wide);
}

}  // namespace

Gemm aten_gemm() { return {&multiply, nullptr}; }

}  // namespace fomoe::binding
