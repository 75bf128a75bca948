// SPDX-License-Identifier: Apache-2.0
// What every binding does before it calls a kernel: check arguments, name what is wrong, allocate.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "fomoe/dtype.h"
#include "fomoe/gemm.h"
#include "fomoe/routing.h"

namespace fomoe::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws the joined parts as one sentence when the condition is false. (STD_TORCH_CHECK would put
/// the C++ function and line in front of it, which tells a user nothing.)
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

/// Hands torch.set_num_threads to OpenMP on the calling thread, as torch's own ops do: OpenMP keeps
/// the number per thread, and torch sets it when a thread first asks.
inline void adopt_num_threads() { torch::stable::get_num_threads(); }

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

/// The kernel dtype of a floating point argument.
inline DType float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      check(false, "fomoe::", op, ": ", name,
            " must be float64, float32, bfloat16 or float16, got ", name_of(tensor.scalar_type()));
      return DType::kFloat32;
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        ScalarType expected) {
  check(tensor.scalar_type() == expected, "fomoe::", op, ": ", name, " must be ", name_of(expected),
        ", got ", name_of(tensor.scalar_type()));
}

/// The type of sums, weights and losses that go with activations of this type.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Checks sizes against `expected`, where -1 stands for any; `legend` is the shape in letters.
inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected, const char* legend) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  std::ostringstream sizes;
  for (int64_t size : expected) {
    sizes << (axis ? ", " : "") << (size < 0 ? std::string("any") : std::to_string(size));
    matches = matches && (size < 0 || tensor.size(axis) == size);
    ++axis;
  }
  check(matches, "fomoe::", op, ": ", name, " must have shape ", legend, " = (", sizes.str(),
        "), got ", shape_of(tensor));
}

/// Values of a dense tensor.
template <typename T>
inline const T* values_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
inline T* values_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

/// A dense tensor that a kernel is about to write, of the dtype and device of `like` unless another
/// dtype is given. A large one on the CPU asks for huge pages: fresh memory is otherwise mapped
/// page by page, which for the gradients of many small experts takes longer than computing them.
Tensor empty_result(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt);

/// Memory for a kernel; freed with the tensor.
inline Tensor workspace_like(const Tensor& tensor, int64_t bytes) {
  return empty_result(tensor, {bytes}, ScalarType::Byte);
}

/// The routing tensors of `route`, their shapes checked against each other. They are made
/// contiguous into `holder`, which must outlive the result.
struct RoutingTensors {
  Tensor slot_to_row;
  Tensor row_to_slot;
  Tensor offsets;
};

inline Routing routing_of(const char* op, const Tensor& slot_to_row, const Tensor& row_to_slot,
                          const Tensor& offsets, RoutingTensors& holder) {
  check_dtype(op, "slot_to_row", slot_to_row, ScalarType::Int);
  check_dtype(op, "row_to_slot", row_to_slot, ScalarType::Int);
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check_shape(op, "slot_to_row", slot_to_row, {-1, -1}, "(T, K)");
  const int64_t num_tokens = slot_to_row.size(0), top_k = slot_to_row.size(1);
  check_shape(op, "row_to_slot", row_to_slot, {num_tokens * top_k}, "(T*K,)");
  check(offsets.dim() == 1 && offsets.size(0) >= 1, "fomoe::", op,
        ": offsets must have shape (E_local + 1,), got ", shape_of(offsets));
  holder = {torch::stable::contiguous(slot_to_row), torch::stable::contiguous(row_to_slot),
            torch::stable::contiguous(offsets)};
  return {values_of<int32_t>(holder.slot_to_row),
          values_of<int32_t>(holder.row_to_slot),
          values_of<int32_t>(holder.offsets),
          num_tokens,
          top_k,
          offsets.size(0) - 1};
}

/// Checks the indices of a routing on the CPU. On a CUDA device nobody looks at them: kernels there
/// clamp them.
inline void check_values(const char* op, const Routing& routing) {
  const char* defect = cpu::defect_of(routing);
  check(!defect, "fomoe::", op, ": ", defect ? defect : "", "; use the result of fomoe::route");
}

/// One matrix per expert. A tensor without a dense axis among the last two is copied into `holder`,
/// which must outlive the result.
inline ExpertMatrices expert_matrices_of(const char* op, const char* name, const Tensor& tensor,
                                         Tensor& holder) {
  check(tensor.dim() == 3, "fomoe::", op, ": ", name, " must have 3 axes, got shape ",
        shape_of(tensor));
  const int64_t rows = tensor.size(1), cols = tensor.size(2);
  const bool has_dense_rows = tensor.stride(2) == 1 && tensor.stride(1) >= cols;
  const bool has_dense_cols = tensor.stride(1) == 1 && tensor.stride(2) >= rows;
  holder = has_dense_rows || has_dense_cols ? tensor : torch::stable::contiguous(tensor);
  return {float_dtype(op, name, tensor),
          holder.const_data_ptr(),
          tensor.size(0),
          rows,
          cols,
          holder.stride(0),
          holder.stride(1),
          holder.stride(2)};
}

/// The stride along the axis that is not dense.
inline int64_t leading_stride(const ExpertMatrices& matrices) {
  return matrices.col_stride == 1 ? matrices.row_stride : matrices.col_stride;
}

}  // namespace fomoe::binding
