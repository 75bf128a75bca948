// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels use vector instructions: plain inner loops, compiled once per instruction
// set.
#pragma once

#include <cstdint>

// A function marked FOMOE_VECTORIZED is compiled for AVX-512, AVX2 and the baseline, and the loader
// picks one. Its own arithmetic is neither fused nor reordered, so that the versions agree to the
// bit; what it calls in the math library may still depend on the processor. The sanitizers cannot
// instrument the resolver that picks, and only glibc calls it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define FOMOE_HAS_CLONES 1
#define FOMOE_VECTORIZED \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOMOE_VECTORIZED
#endif

// Helpers of such functions must end up inside them to be compiled for the same instruction set.
#define FOMOE_INLINE inline __attribute__((always_inline))

namespace fomoe {

/// Sum of term(i) for i in [0, count), over 16 interleaved partial sums added in ascending order:
/// vectorises, in one order for every vector width.
template <typename Sum, typename Term>
FOMOE_INLINE Sum sum_of(int64_t count, const Term& term) {
  constexpr int64_t kLanes = 16;
  Sum lanes[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += term(i);
  Sum sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

}  // namespace fomoe
