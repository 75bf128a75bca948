// SPDX-License-Identifier: Apache-2.0
// What this binary was compiled for, and what the machine it runs on offers.
#pragma once

#include <string>

namespace fomoe {

/// True when the CUDA kernels were compiled into this binary.
bool compiled_with_cuda();

/// CUDA runtime the kernels were compiled with, as "13.0"; empty without CUDA.
std::string cuda_compile_version();

/// Number of usable CUDA devices; 0 without a driver, never throws.
int cuda_device_count();

/// Widest vector instruction set that the CPU kernels use on this machine:
/// "x86-64-v4" (AVX-512), "x86-64-v3" (AVX2) or "baseline". The last also where the compiler, the C
/// library or a sanitizer left no other to choose from, see vectorize.h.
std::string cpu_capability();

}  // namespace fomoe
