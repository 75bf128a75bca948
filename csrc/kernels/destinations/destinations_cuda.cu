// SPDX-License-Identifier: Apache-2.0
// A block owns some tokens and keeps the groups of their slots in shared memory; a thread owns a
// slot: it drops its group if an earlier slot of the token has the same, and otherwise places it
// after the token's smaller groups. K comparisons per slot, twice: K is small.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "fomoe/destinations.h"

namespace fomoe::cuda {
namespace {

constexpr int64_t kMostTopK = 4096;  // whose tables fit in the shared memory of any card
constexpr int kThreads = 256;
constexpr int32_t kNone = std::numeric_limits<int32_t>::max();  // after every group

struct Choices {
  const int32_t* ids;              // [num_tokens, top_k]
  const int32_t* group_of_expert;  // [num_experts]
  int64_t num_tokens, num_experts, num_groups;
  int top_k, width, tokens_per_block;

  /// kNone without a group, for wrong ids and for groups that do not exist.
  FOMOE_DEVICE int32_t group(int64_t slot) const {
    const int32_t id = load_global_once(ids + slot);
    if (id < 0 || id >= num_experts) return kNone;
    const int32_t group = load_global(group_of_expert + id);
    return group < 0 || group >= num_groups ? kNone : group;
  }
};

__global__ void __launch_bounds__(kThreads)
    destinations_kernel(Choices choices, int32_t* destinations) {
  const int top_k = choices.top_k, width = choices.width;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * choices.tokens_per_block;
  const int num_slots = top_k * static_cast<int>(std::min<int64_t>(
                                    choices.tokens_per_block, choices.num_tokens - first_token));
  int32_t* groups = &dynamic_shared<int32_t>();                   // [tokens_per_block, top_k]
  int32_t* distinct = groups + choices.tokens_per_block * top_k;  // the same, repeats kNone
  for (int slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    groups[slot] = choices.group(first_token * top_k + slot);
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    const int32_t group = groups[slot];
    bool is_repeated = false;
    for (int other = slot - slot % top_k; other < slot; ++other) {
      is_repeated = is_repeated || groups[other] == group;
    }
    distinct[slot] = is_repeated ? kNone : group;
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    const int k = slot % top_k, first_slot = slot - k;
    const int32_t own = distinct[slot];
    int smaller = 0, found = 0;
    for (int other = first_slot; other < first_slot + top_k; ++other) {
      smaller += distinct[other] < own;
      found += distinct[other] != kNone;
    }
    int32_t* row = destinations + (first_token + slot / top_k) * width;
    if (own != kNone) store_global(row + smaller, own);
    if (k >= found && k < width) store_global(row + k, -1);
  }
}

}  // namespace

void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_experts, int64_t num_groups,
                  int32_t* destinations, Stream stream) {
  if (top_k > kMostTopK) {
    throw std::invalid_argument("fomoe: destinations: top_k must be at most " +
                                std::to_string(kMostTopK) + " on a GPU, got " +
                                std::to_string(top_k));
  }
  const int64_t width = num_destinations(top_k, num_groups);
  if (width == 0) return;
  const int64_t tokens_per_block = std::max<int64_t>(kThreads / top_k, 1);
  const Choices choices = {ids,
                           group_of_expert,
                           num_tokens,
                           num_experts,
                           num_groups,
                           static_cast<int>(top_k),
                           static_cast<int>(width),
                           static_cast<int>(tokens_per_block)};
  launch({"destinations", ceil_div(num_tokens, tokens_per_block), kThreads,
          8 * tokens_per_block * top_k},
         stream, destinations_kernel, choices, destinations);
}

}  // namespace fomoe::cuda
