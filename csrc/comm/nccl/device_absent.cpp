// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "comm/nccl/device.h"

namespace fomoe::comm::nccl {

void check_cuda_device() {
  throw std::runtime_error(
      "NCCL: this build of fomoe has no CUDA; install it again with nvcc on PATH (FOMOE_CUDA=ON), "
      "or use a transport over the CPU");
}

std::unique_ptr<Device> cuda_device() {
  check_cuda_device();
  return nullptr;
}

}  // namespace fomoe::comm::nccl
