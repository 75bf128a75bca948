// SPDX-License-Identifier: Apache-2.0
// What a kernel's accesses would cost.
#pragma once

#include <cstdint>

#include "block.h"

namespace fomoe::emulation {

enum class Access { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };

/// One lane's access; `site` tells which instruction it is, so that the lanes of a warp are put
/// together.
void note_access(Access access, const void* address, int64_t bytes, const void* site);

/// Adds a finished block to the totals.
void finish_counting(Block& block);

}  // namespace fomoe::emulation
