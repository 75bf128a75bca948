// SPDX-License-Identifier: Apache-2.0
#include "fomoe/device.h"

#include "fomoe/vectorize.h"

namespace fomoe {

#ifndef FOMOE_WITH_CUDA
bool compiled_with_cuda() { return false; }
std::string cuda_compile_version() { return ""; }
int cuda_device_count() { return 0; }
#endif

std::string cpu_capability() {
#ifdef FOMOE_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace fomoe
