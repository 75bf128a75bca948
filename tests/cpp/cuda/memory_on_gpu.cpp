// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda/on_device.h"

namespace on_device {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes ? bytes : 1));
  return memory;
}
void release(void* memory) { cudaFree(memory); }
void copy_to(void* target, const void* host, int64_t bytes) {
  check(cudaMemcpy(target, host, bytes, cudaMemcpyHostToDevice));
}
void copy_from(void* host, const void* source, int64_t bytes) {
  check(cudaMemcpy(host, source, bytes, cudaMemcpyDeviceToHost));
}
void synchronize() { check(cudaDeviceSynchronize()); }

}  // namespace on_device
