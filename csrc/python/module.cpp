// SPDX-License-Identifier: Apache-2.0
// fomoe._C: what this binary was built with, and which kernels it would choose. Importing it loads
// the op library it is linked to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "all_to_all_plan.h"
#include "fomoe/device.h"
#include "fomoe/kernel_path.h"

namespace {

fomoe::DType dtype_of(const std::string& name) {
  using fomoe::DType;
  for (const auto& [known, dtype] : {std::pair("float64", DType::kFloat64),
                                     {"float32", DType::kFloat32},
                                     {"bfloat16", DType::kBFloat16},
                                     {"float16", DType::kFloat16}}) {
    if (name == known) return dtype;
  }
  throw std::invalid_argument("choose_path: no kernel has dtype " + name);
}

/// Name of the path, and what stands in the way of tensor cores.
std::pair<std::string, std::optional<std::string>> choose_path(
    int compute_capability, const std::string& dtype, const std::vector<uintptr_t>& addresses,
    const std::vector<int64_t>& widths) {
  // Both are asked for multiples of powers of two, so that one number stands for all.
  uintptr_t address = 0;
  int64_t width = 0;
  for (const uintptr_t each : addresses) address |= each;
  for (const int64_t each : widths) width |= each;
  const fomoe::ProductOperands operands = {
      dtype_of(dtype), {reinterpret_cast<const void*>(address)}, {width}};
  const char* obstacle = fomoe::obstacle_to_tensor_cores(operands);
  return {fomoe::name_of(fomoe::choose_path(compute_capability, operands)),
          obstacle ? std::optional<std::string>(obstacle) : std::nullopt};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("commit") = FOMOE_COMMIT;
  m.attr("torch_version") = FOMOE_TORCH_VERSION;
  m.attr("compiler") = FOMOE_COMPILER;
  m.attr("cuda_version") = fomoe::cuda_compile_version();
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("compiled_with_cuda", &fomoe::compiled_with_cuda);
  m.def("cuda_device_count", &fomoe::cuda_device_count);
  m.def("cpu_capability", &fomoe::cpu_capability);
  m.def("choose_path", &choose_path);
  m.def("is_decode", &fomoe::is_decode);
  define_all_to_all_plan(m);
}
