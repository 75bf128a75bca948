// SPDX-License-Identifier: Apache-2.0
// The experts that tokens may choose among. The CPU kernels work on rows of these only.
#pragma once

#include <numeric>

#include "fomoe/topk_gate.h"

namespace fomoe::cpu {

/// "Position" is an index among the eligible experts, which are in ascending order.
struct Eligible {
  Eligible(const Gate& gate, const bool* resident) {
    const int64_t group_size = gate.num_experts / gate.num_groups;
    for (int64_t e = 0; e < gate.num_experts; ++e) {
      if (e % group_size == 0) group_begin[e / group_size] = static_cast<int32_t>(count);
      const bool is_eligible = !resident || resident[e];
      positions[e] = is_eligible ? static_cast<int32_t>(count) : -1;
      if (is_eligible) experts[count++] = static_cast<int32_t>(e);
    }
    group_begin[gate.num_groups] = static_cast<int32_t>(count);
    is_all = count == gate.num_experts;
  }

  int64_t count = 0;
  bool is_all;
  int32_t experts[kMaxExperts];          // by position
  int32_t positions[kMaxExperts];        // by expert; -1: not eligible
  int32_t group_begin[kMaxExperts + 1];  // members of group g: positions from [g] up to [g + 1]
};

}  // namespace fomoe::cpu
