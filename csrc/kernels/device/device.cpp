// SPDX-License-Identifier: Apache-2.0
#include "fomoe/device.h"

namespace fomoe {

#ifndef FOMOE_WITH_CUDA
bool compiled_with_cuda() { return false; }
std::string cuda_compile_version() { return ""; }
int cuda_device_count() { return 0; }
#endif

std::string cpu_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "x86-64-v4";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace fomoe
