// SPDX-License-Identifier: Apache-2.0
// route: a stable counting sort of the slots by resident expert; ghosts, missing ids and, beyond an
// expert's capacity, its latest slots (drops) get no row.
//
// Minimum traffic: read T*K ids twice, write 2*T*K indices. Deterministic.
#pragma once

#include <cstdint>
#include <limits>

#include "fomoe/cuda.h"

namespace fomoe {

/// The capacity that drops nothing.
inline constexpr int64_t kDropless = std::numeric_limits<int64_t>::max();

namespace cpu {
/// Room for one counter per resident expert.
int64_t route_workspace_bytes(int64_t num_local_experts);

/// ids [num_slots] in [-1, E), expert_map [E] in [-1, num_local_experts): global -> local or -1;
/// slot_to_row, row_to_slot [num_slots], offsets [num_local_experts + 1]. num_slots < 2^31.
/// capacity >= 0: the most rows of an expert.
void route(const int32_t* ids, int64_t num_slots, const int32_t* expert_map,
           int64_t num_local_experts, int64_t capacity, int32_t* slot_to_row, int32_t* row_to_slot,
           int32_t* offsets, void* workspace);
}  // namespace cpu

namespace cuda {
int64_t route_workspace_bytes(int64_t num_slots, int64_t num_local_experts);

/// num_experts: length of expert_map. The rest as on the CPU, with the same result.
/// Throws std::invalid_argument for more than 4096 local experts.
void route(const int32_t* ids, int64_t num_slots, const int32_t* expert_map, int64_t num_experts,
           int64_t num_local_experts, int64_t capacity, int32_t* slot_to_row, int32_t* row_to_slot,
           int32_t* offsets, void* workspace, Stream stream);
}  // namespace cuda

namespace reference {
void route(const int32_t* ids, int64_t num_slots, const int32_t* expert_map,
           int64_t num_local_experts, int64_t capacity, int32_t* slot_to_row, int32_t* row_to_slot,
           int32_t* offsets);
}  // namespace reference

}  // namespace fomoe
