// SPDX-License-Identifier: Apache-2.0
// The one way kernels use threads. OpenMP, so that torch.set_num_threads applies to them too.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fomoe {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Calls function(begin, end) over disjoint pieces of [0, count), each of at least `grain` items.
/// Which thread gets which piece must not matter: callers write disjoint outputs only.
template <typename Function>
inline void parallel_for(int64_t count, int64_t grain, const Function& function) {
  if (count <= 0) return;
#ifdef _OPENMP
  const int64_t pieces = std::min<int64_t>(omp_get_max_threads(), count / grain);
  if (pieces > 1 && !omp_in_parallel()) {
#pragma omp parallel for num_threads(static_cast<int>(pieces)) schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      function(count * piece / pieces, count * (piece + 1) / pieces);
    }
    return;
  }
#endif
  function(int64_t{0}, count);
}

}  // namespace fomoe
