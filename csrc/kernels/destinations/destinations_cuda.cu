// SPDX-License-Identifier: Apache-2.0
// A thread owns a token.
#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "destinations/distinct_groups.h"
#include "fomoe/destinations.h"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 256;

struct Choices {
  const int32_t* ids;              // [T, K]
  const int32_t* group_of_expert;  // [E]
  int64_t num_tokens, top_k, num_experts, num_groups, width;
};

__global__ void __launch_bounds__(kThreads) destinations_kernel(Choices choices, int32_t* out) {
  const int64_t token = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (token >= choices.num_tokens) return;
  store_distinct_groups(
      choices.top_k, choices.num_groups, choices.width,
      [&](int64_t k) {
        const int32_t id = load_global(choices.ids + token * choices.top_k + k);
        if (id < 0 || id >= choices.num_experts) return int32_t{-1};
        const int32_t group = load_global(choices.group_of_expert + id);
        return group < choices.num_groups ? group : -1;
      },
      [&](int64_t i, int32_t group) { store_global(out + token * choices.width + i, group); });
}

}  // namespace

void destinations(const int32_t* ids, int64_t num_tokens, int64_t top_k,
                  const int32_t* group_of_expert, int64_t num_experts, int64_t num_groups,
                  int32_t* out, Stream stream) {
  const int64_t width = max_destinations(top_k, num_groups);
  if (num_tokens == 0 || width == 0) return;
  const Choices choices = {ids, group_of_expert, num_tokens, top_k, num_experts, num_groups, width};
  launch({"destinations", ceil_div(num_tokens, kThreads), kThreads}, stream, destinations_kernel,
         choices, out);
}

}  // namespace fomoe::cuda
