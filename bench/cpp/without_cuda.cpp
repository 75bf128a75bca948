// SPDX-License-Identifier: Apache-2.0
// Where nvcc was not there, or not wanted.
#include "arguments.h"
#include "cublas.h"
#include "device_cpu.h"
#include "ops.h"

namespace bench {

std::unique_ptr<Device> open_device(const std::string& name) {
  if (name == "cpu") return std::make_unique<CpuDevice>();
  throw UsageError(
      "--device: cuda: this binary was built without CUDA; build it where nvcc is, or use "
      "--device cpu");
}

std::unique_ptr<Ops> make_cuda_ops(Device&) { return nullptr; }

std::unique_ptr<ProductOps> make_cuda_product_ops(Device&) { return nullptr; }

std::unique_ptr<DenseLibrary> open_cublas(const std::string&, Device&) { return nullptr; }

}  // namespace bench
