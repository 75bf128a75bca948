// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels read the slots of a token: a lane each, handed round by shuffles, so that a
// warp reads them in one request. An index that would lead outside an array counts as -1.
#pragma once

#include "cuda/memory.cuh"
#include "fomoe/routing.h"

namespace fomoe::cuda {

/// Negative for a skipped path, and from slot `end` on.
FOMOE_DEVICE int32_t row_of(const Routing& routing, int64_t slot, int64_t end) {
  const int32_t row = slot < end ? load_global(routing.slot_to_row + slot) : -1;
  return row < routing.num_rows() ? row : -1;
}

}  // namespace fomoe::cuda
