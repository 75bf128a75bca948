// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include "fomoe/device.h"
#include "fomoe/kernel_path.h"

namespace fomoe {

bool compiled_with_cuda() { return true; }

std::string cuda_compile_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

int cuda_device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // a missing driver must not poison the next CUDA call
    return 0;
  }
  return count;
}

int cuda_compute_capability() {
  int device = 0, major = 0, minor = 0;
  const bool found =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  if (!found) cudaGetLastError();
  return found ? 10 * major + minor : 0;
}

}  // namespace fomoe
