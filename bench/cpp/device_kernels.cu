// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <algorithm>

#include "device_kernels.h"

namespace bench {
namespace {

constexpr int kThreads = 256, kUnroll = 4;

__global__ void __launch_bounds__(kThreads)
    bench_copy_kernel(uint4* __restrict__ target, const uint4* __restrict__ source, int64_t count) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  uint4 values[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (first + i * kThreads < count) values[i] = __ldcs(source + first + i * kThreads);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (first + i * kThreads < count) __stcs(target + first + i * kThreads, values[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    bench_read_kernel(const uint4* __restrict__ source, int64_t count, int* never_written) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned found = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const uint4 value = source[i];
    found |= value.x | value.y | value.z | value.w;
  }
  if (found != 0) *never_written = 1;  // the array holds zeros
}

}  // namespace

void launch_copy(void* target, const void* source, int64_t bytes, cudaStream_t stream) {
  const int64_t count = bytes / 16, per_block = kThreads * kUnroll;
  const int64_t blocks = (count + per_block - 1) / per_block;
  if (blocks == 0) return;
  bench_copy_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<uint4*>(target), static_cast<const uint4*>(source), count);
}

void launch_read(const void* source, int64_t bytes, int* never_written, cudaStream_t stream) {
  bench_read_kernel<<<1024, kThreads, 0, stream>>>(static_cast<const uint4*>(source), bytes / 16,
                                                   never_written);
}

}  // namespace bench
