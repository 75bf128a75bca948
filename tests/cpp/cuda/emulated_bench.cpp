// SPDX-License-Identifier: Apache-2.0
// The device of a benchmark that runs on emulated kernels: it calls what it would call on Hopper.
#include "../../../bench/cpp/cublas.h"
#include "../../../bench/cpp/device_cpu.h"

namespace bench {

std::unique_ptr<Device> open_device(const std::string&) {
  return std::make_unique<CpuDevice>("emulated", 90);
}

std::unique_ptr<DenseLibrary> open_cublas(const std::string&, Device&) { return nullptr; }

}  // namespace bench
