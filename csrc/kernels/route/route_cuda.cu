// SPDX-License-Identifier: Apache-2.0
// A stable counting sort. Slots are split among blocks, a block's slots among its warps, both in
// ascending order; a slot's rank among those of its expert is the sum of
//
//   the expert's slots in earlier blocks   (count_kernel, then accumulate_kernel)
//   those in earlier warps of the block    (counted by scatter_kernel)
//   those in earlier lanes of the warp     (match_any)
//
// Few slots are one block's: one launch. The only atomics are those that count.
#include <algorithm>
#include <stdexcept>

#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "fomoe/route.h"
#include "fomoe/workspace.h"

namespace fomoe::cuda {
namespace {

constexpr int64_t kFewSlots = 4096;          // for one block
constexpr int64_t kMostLocalExperts = 4096;  // whose tables fit in the shared memory of any card
constexpr int64_t kSlotsPerWarp = 128;
constexpr int kMostWarps = 32;

struct Slots {
  const int32_t* ids;         // [count]
  const int32_t* expert_map;  // [num_experts]
  int64_t count, per_block, per_warp, num_experts;
  int num_local_experts;

  /// -1 without a resident expert, for wrong ids and for slots that do not exist.
  FOMOE_DEVICE int local_expert(int64_t slot) const {
    if (slot >= count) return -1;
    const int32_t id = load_global(ids + slot);
    if (id < 0 || id >= num_experts) return -1;
    const int32_t local = load_global(expert_map + id);
    return local < num_local_experts ? std::max(local, -1) : -1;
  }
};

/// How the work is split, by numbers that the host knows.
struct Split {
  Split(int64_t num_slots, int64_t num_local_experts) {
    // Enough blocks for any card, and few enough that adding up their counts is cheap; a block
    // counts its slots in 16 bits.
    slots_per_block = std::clamp<int64_t>(ceil_div(num_slots, 256), kFewSlots / 2, 1 << 15);
    if (num_slots <= kFewSlots) slots_per_block = kFewSlots;
    num_blocks = std::max<int64_t>(1, ceil_div(num_slots, slots_per_block));
    const int64_t slots = std::min(num_slots, slots_per_block);
    const int64_t room = 8 * kMostLocalExperts / std::max<int64_t>(num_local_experts, 1);
    num_warps = static_cast<int>(std::clamp<int64_t>(ceil_div(slots, kSlotsPerWarp), 1,
                                                     std::min<int64_t>(room, kMostWarps)));
    slots_per_warp = ceil_div(slots, num_warps * kWarpSize) * kWarpSize;
  }

  int64_t slots_per_block, slots_per_warp, num_blocks;
  int num_warps;
};

/// The workspace; not used by a single block.
struct BlockCounts {
  BlockCounts(const Split& split, int64_t num_local_experts, Workspace& workspace)
      : counts(workspace.take<int32_t>(split.num_blocks * num_local_experts)),
        totals(workspace.take<int32_t>(num_local_experts)) {}

  int32_t* counts;  // [blocks, E_local]: of a block, then of the blocks before it
  int32_t* totals;  // [E_local]
};

__global__ void __launch_bounds__(kMostWarps* kWarpSize)
    count_kernel(Slots slots, BlockCounts blocks) {
  int32_t* counts = &dynamic_shared<int32_t>();  // [E_local]
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int e = thread; e < slots.num_local_experts; e += threads) counts[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * slots.per_block;
  for (int64_t i = thread; i < slots.per_block && begin + i < slots.count; i += threads) {
    const int local = slots.local_expert(begin + i);
    if (local >= 0) atomicAdd(counts + local, 1);
  }
  __syncthreads();
  int32_t* row = blocks.counts + static_cast<int64_t>(blockIdx.x) * slots.num_local_experts;
  for (int e = thread; e < slots.num_local_experts; e += threads) store_global(row + e, counts[e]);
}

/// A block owns 32 experts, one per lane, and each of its warps a segment of the blocks.
__global__ void __launch_bounds__(kMostWarps* kWarpSize)
    accumulate_kernel(BlockCounts blocks, int64_t num_blocks, int num_local_experts) {
  int32_t* sums = &dynamic_shared<int32_t>();  // [segments, 32]
  const int lane = threadIdx.x % kWarpSize, segment = threadIdx.x / kWarpSize;
  const int num_segments = blockDim.x / kWarpSize;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const int64_t length = ceil_div(num_blocks, num_segments);
  const int64_t begin = std::min<int64_t>(segment * length, num_blocks),
                end = std::min(begin + length, num_blocks);
  int32_t* column = blocks.counts + expert;
  const bool exists = expert < num_local_experts;
  int32_t sum = 0;
  for (int64_t block = begin; block < end && exists; ++block) {
    sum += load_global_once(column + block * num_local_experts);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (!exists) return;
  int32_t before = 0;
  for (int i = 0; i < segment; ++i) before += sums[i * kWarpSize + lane];
  for (int64_t block = begin; block < end; ++block) {
    const int32_t count = load_global_once(column + block * num_local_experts);
    store_global(column + block * num_local_experts, before);
    before += count;
  }
  if (segment == num_segments - 1) store_global(blocks.totals + expert, before);
}

/// The shared memory of scatter_kernel.
struct Tables {
  FOMOE_DEVICE explicit Tables(int num_local_experts)
      : warp_sums(&dynamic_shared<int32_t>()),
        offsets(warp_sums + kMostWarps),
        first_row(offsets + num_local_experts + 1),
        before(reinterpret_cast<uint16_t*>(first_row + num_local_experts)) {}

  static int64_t bytes(int64_t num_local_experts, int num_warps) {
    return 4 * (kMostWarps + 2 * num_local_experts + 1) + 2 * num_warps * num_local_experts;
  }

  int32_t* warp_sums;  // [warps]
  int32_t* offsets;    // [E_local + 1]
  int32_t* first_row;  // [E_local]: of the block
  uint16_t* before;    // [warps, E_local]: slots of the warp, then slots before those still to come
};

/// Lanes with the same expert, and the number of them that come before.
struct Peers {
  FOMOE_DEVICE explicit Peers(int local) : mask(__match_any_sync(kAllLanes, local)) {
    const unsigned lower = (1u << (threadIdx.x % kWarpSize)) - 1;
    rank = __popc(mask & lower);
    is_first = rank == 0;
  }
  unsigned mask;
  int rank;
  bool is_first;
};

/// Calls function(slot, local expert) with all lanes for the slots of this warp, in order.
template <typename Function>
FOMOE_DEVICE void for_each_slot(const Slots& slots, const Function& function) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t block_begin = blockIdx.x * slots.per_block;
  const int64_t block_end = std::min(block_begin + slots.per_block, slots.count);
  const int64_t begin = block_begin + warp * slots.per_warp;
  const int64_t end = std::min(begin + slots.per_warp, block_end);
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t slot = first + lane;
    function(slot, slot < end ? slots.local_expert(slot) : -1);
  }
}

FOMOE_DEVICE void count_per_warp(const Slots& slots, const Tables& tables) {
  const int num_warps = blockDim.x / kWarpSize;
  for (int i = threadIdx.x; i < num_warps * slots.num_local_experts; i += blockDim.x) {
    tables.before[i] = 0;
  }
  __syncthreads();
  uint16_t* counts = tables.before + threadIdx.x / kWarpSize * slots.num_local_experts;
  for_each_slot(slots, [&](int64_t, int local) {
    const Peers peers(local);
    if (local >= 0 && peers.is_first) {
      counts[local] = static_cast<uint16_t>(counts[local] + __popc(peers.mask));
    }
    __syncwarp();
  });
  __syncthreads();
}

/// Slots in earlier warps, per expert; returns those of the whole block.
FOMOE_DEVICE int32_t accumulate_warps(const Tables& tables, int num_local_experts, int expert) {
  int32_t sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    uint16_t& count = tables.before[warp * num_local_experts + expert];
    const int32_t own = count;
    count = static_cast<uint16_t>(sum);
    sum += own;
  }
  return sum;
}

/// Sum of the values of earlier threads; adds the sum of all to `total`.
FOMOE_DEVICE int32_t sum_before(int32_t value, int32_t* warp_sums, int32_t& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t inclusive = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  __syncthreads();  // the previous sums have been read
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t before = total + inclusive - value;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) {
    if (i < warp) before += warp_sums[i];
    total += warp_sums[i];
  }
  return before;
}

/// offsets and first_row, all experts' in every block.
FOMOE_DEVICE void place_experts(const Slots& slots, int32_t capacity, const BlockCounts& blocks,
                                const Tables& tables) {
  const int num_local_experts = slots.num_local_experts;
  int32_t total = 0;
  for (int first = 0; first < num_local_experts; first += blockDim.x) {
    const int expert = first + static_cast<int>(threadIdx.x);
    const bool exists = expert < num_local_experts;
    int32_t num_slots = 0, in_earlier_blocks = 0;
    if (exists) {
      num_slots = accumulate_warps(tables, num_local_experts, expert);
      if (gridDim.x > 1) {
        num_slots = load_global(blocks.totals + expert);
        in_earlier_blocks = load_global(
            blocks.counts + static_cast<int64_t>(blockIdx.x) * num_local_experts + expert);
      }
    }
    const int32_t offset = sum_before(std::min(num_slots, capacity), tables.warp_sums, total);
    if (exists) {
      tables.offsets[expert] = offset;
      tables.first_row[expert] = offset + in_earlier_blocks;
    }
  }
  if (threadIdx.x == 0) tables.offsets[num_local_experts] = total;
  __syncthreads();
}

__global__ void __launch_bounds__(kMostWarps* kWarpSize)
    scatter_kernel(Slots slots, int32_t capacity, BlockCounts blocks, int32_t* slot_to_row,
                   int32_t* row_to_slot, int32_t* offsets) {
  const int num_local_experts = slots.num_local_experts;
  const Tables tables(num_local_experts);
  count_per_warp(slots, tables);
  place_experts(slots, capacity, blocks, tables);

  uint16_t* before = tables.before + threadIdx.x / kWarpSize * num_local_experts;
  for_each_slot(slots, [&](int64_t slot, int local) {
    const Peers peers(local);
    int32_t row = -1;
    if (local >= 0) {
      row = tables.first_row[local] + before[local] + peers.rank;
      if (row >= tables.offsets[local + 1]) row = -1;  // dropped
    }
    __syncwarp();
    if (local >= 0 && peers.is_first) {
      before[local] = static_cast<uint16_t>(before[local] + __popc(peers.mask));
    }
    __syncwarp();
    if (slot < slots.count) store_global(slot_to_row + slot, row);
    if (row >= 0) store_global(row_to_slot + row, static_cast<int32_t>(slot));
  });

  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = tables.offsets[num_local_experts] + thread; row < slots.count;
       row += threads) {
    store_global(row_to_slot + row, -1);
  }
  for (int64_t e = thread; e <= num_local_experts; e += threads) {
    store_global(offsets + e, tables.offsets[e]);
  }
}

}  // namespace

int64_t route_workspace_bytes(int64_t num_slots, int64_t num_local_experts) {
  const Split split(num_slots, num_local_experts);
  if (split.num_blocks == 1) return 0;
  Workspace workspace(nullptr);
  const BlockCounts counts(split, num_local_experts, workspace);
  return workspace.bytes();
}

void route(const int32_t* ids, int64_t num_slots, const int32_t* expert_map, int64_t num_experts,
           int64_t num_local_experts, int64_t capacity, int32_t* slot_to_row, int32_t* row_to_slot,
           int32_t* offsets, void* workspace, Stream stream) {
  if (num_local_experts > kMostLocalExperts) {
    throw std::invalid_argument("fomoe: route: num_local_experts must be at most " +
                                std::to_string(kMostLocalExperts) + " on a GPU, got " +
                                std::to_string(num_local_experts));
  }
  const Split split(num_slots, num_local_experts);
  Workspace memory(workspace);
  const BlockCounts blocks(split, num_local_experts, memory);
  const Slots slots = {ids,
                       expert_map,
                       num_slots,
                       split.slots_per_block,
                       split.slots_per_warp,
                       num_experts,
                       static_cast<int>(num_local_experts)};
  const int threads = split.num_warps * kWarpSize;
  if (split.num_blocks > 1) {
    launch({"route_count", split.num_blocks, threads, 4 * num_local_experts}, stream, count_kernel,
           slots, blocks);
    const int segment_threads =
        static_cast<int>(std::min<int64_t>(split.num_blocks, kMostWarps)) * kWarpSize;
    launch({"route_accumulate", ceil_div(num_local_experts, kWarpSize), segment_threads,
            4 * segment_threads},
           stream, accumulate_kernel, blocks, split.num_blocks,
           static_cast<int>(num_local_experts));
  }
  launch({"route_scatter", split.num_blocks, threads,
          Tables::bytes(num_local_experts, split.num_warps)},
         stream, scatter_kernel, slots, static_cast<int32_t>(std::min(capacity, num_slots)), blocks,
         slot_to_row, row_to_slot, offsets);
}

}  // namespace fomoe::cuda
