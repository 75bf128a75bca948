// SPDX-License-Identifier: Apache-2.0
// Functions that the CPU and the CUDA kernels share. Device code is compiled with
// --expt-relaxed-constexpr, for std::bit_cast.
#pragma once

#if defined(__CUDACC__)
#define FOMOE_HOST_DEVICE __host__ __device__
#else
#define FOMOE_HOST_DEVICE
#endif
