// SPDX-License-Identifier: Apache-2.0
// What every CUDA kernel file includes first: launching, and shared memory.
//
// Kernels keep to a few rules so that the same source also compiles as C++ and runs on the CPU
// (csrc/emulation):
//  * PTX and special registers only in the wrappers of this folder, each with a model there;
//  * shared memory only through dynamic_shared<Layout>(), whose overruns a sanitizer then sees;
//  * global memory through memory.cuh, where accesses are counted;
//  * no static state, no assert, no printf.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fomoe/cuda.h"

#ifndef FOMOE_EMULATION
#include <cuda_runtime.h>
#endif

#define FOMOE_DEVICE __device__ __forceinline__

namespace fomoe::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// What a kernel runs with. A grid without blocks launches nothing.
struct LaunchShape {
  const char* name;  // of the kernel, in errors and reports
  int64_t blocks;
  int threads;  // per block
  int64_t shared_bytes = 0;
};

#ifdef FOMOE_EMULATION

template <typename Layout>
inline Layout& dynamic_shared() {
  return *reinterpret_cast<Layout*>(emulation::block().shared);
}

template <typename... Parameters, typename... Arguments>
inline void launch(const LaunchShape& shape, Stream, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  emulation::launch(shape.name, shape.blocks, shape.threads, shape.shared_bytes,
                    [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int multiprocessor_count() { return emulation::kMultiprocessors; }

#else

/// The block's dynamic shared memory, 1024-byte aligned, uninitialised.
template <typename Layout>
__device__ __forceinline__ Layout& dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fomoe_shared_memory[];
  return *reinterpret_cast<Layout*>(fomoe_shared_memory);
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here: do not report it again at the next call
  throw std::runtime_error(std::string("fomoe: ") + what + ": " + cudaGetErrorString(status));
}

template <typename... Parameters, typename... Arguments>
inline void launch(const LaunchShape& shape, Stream stream, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  if (shape.blocks == 0) return;
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          shape.name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), shape.name);
}

/// Of the current device.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

#endif

}  // namespace fomoe::cuda
