// SPDX-License-Identifier: Apache-2.0
#include "aten_gemm.h"

#include <array>
#include <optional>

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

Tensor tensor_over(const void* data, std::initializer_list<int64_t> sizes,
                   std::initializer_list<int64_t> strides, DType dtype) {
  static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  // A tensor has no const data; the products only read their operands.
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, cpu,
                                  scalar_type_of(dtype));
}

Tensor tensor_over(const Matrix& matrix, DType dtype) {
  return tensor_over(matrix.data, {matrix.rows, matrix.cols},
                     {matrix.row_stride, matrix.col_stride}, dtype);
}

/// c = a b + bias, rounded once.
void product_out(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                 const Tensor& c) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack;
  if (bias) {
    stack = {from(a), from(torch::stable::transpose(b, 0, 1)), from(bias), from(c)};
  } else {
    stack = {from(a), from(b), from(c)};
  }
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(bias ? "aten::linear" : "aten::mm", "out",
                                               stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference to c, to drop it
}

void multiply(void*, DType dtype, const Matrix& a, const Matrix& b, const void* bias,
              const DenseMatrix& c) {
  const Tensor left = tensor_over(a, dtype), right = tensor_over(b, dtype);
  std::optional<Tensor> addend;
  if (bias) addend = tensor_over(bias, {c.cols}, {1}, dtype);
  Tensor product = tensor_over(c.view(), dtype);
  if (dtype != DType::kFloat16) return product_out(left, right, addend, product);

  // Where the processor has no float16 arithmetic, torch's own product is some five times slower
  // than widening the operands; and this way the result does not depend on the processor.
  const auto wide = [](const Tensor& tensor) {
    return torch::stable::to(tensor, ScalarType::Float);
  };
  if (addend) addend = wide(*addend);
  const Tensor sums = torch::stable::new_empty(product, {c.rows, c.cols}, ScalarType::Float);
  product_out(wide(left), wide(right), addend, sums);
  torch::stable::copy_(product, sums);
}

}  // namespace

Gemm aten_gemm() { return {&multiply, nullptr}; }

}  // namespace fomoe::binding
