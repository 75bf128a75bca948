// SPDX-License-Identifier: Apache-2.0
// fomoe._C: what this binary was built with. Importing it loads the op library it is linked to.
#include <pybind11/pybind11.h>

#include "fomoe/device.h"

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
}
