// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "fomoe/host_device.h"

namespace fomoe {

/// Calls store(i, group) for the i-th smallest of the distinct values group_at(0 .. top_k - 1) in
/// [0, num_groups), and store(i, -1) for the rest of `width`. A set of 64 groups at a time.
template <typename GroupAt, typename Store>
FOMOE_HOST_DEVICE void store_distinct_groups(int64_t top_k, int64_t num_groups, int64_t width,
                                             GroupAt group_at, Store store) {
  int64_t found = 0;
  for (int64_t base = 0; base < num_groups && found < width; base += 64) {
    uint64_t present = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t bit = group_at(k) - base;
      if (bit >= 0 && bit < 64) present |= uint64_t{1} << bit;
    }
    for (int64_t group = base; present != 0 && found < width; ++group, present >>= 1) {
      if ((present & 1) != 0) store(found++, static_cast<int32_t>(group));
    }
  }
  for (; found < width; ++found) store(found, -1);
}

}  // namespace fomoe
