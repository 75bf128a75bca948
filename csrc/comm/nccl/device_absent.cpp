// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "nccl/device.h"

namespace fomoe::comm::nccl {

std::unique_ptr<Device> cuda_device() {
  throw std::runtime_error(
      "NCCL: this build of fomoe has no CUDA; install it again with nvcc on PATH (FOMOE_CUDA=ON), "
      "or use a transport over the CPU");
}

}  // namespace fomoe::comm::nccl
