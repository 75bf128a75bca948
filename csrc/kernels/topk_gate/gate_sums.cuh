// SPDX-License-Identifier: Apache-2.0
// The gate's sums over tokens: every block leaves its own in the workspace, and a second kernel
// adds them up in a fixed order.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "fomoe/topk_gate.h"
#include "fomoe/workspace.h"

namespace fomoe::cuda {

template <typename Real>
struct GateSums {
  GateSums(int64_t num_blocks, int64_t num_experts, Workspace& workspace)
      : num_blocks(num_blocks),
        num_experts(num_experts),
        z_sum(workspace.take<double>(num_blocks)),
        prob_sum(workspace.take<Real>(num_blocks * num_experts)),
        counts(workspace.take<int32_t>(num_blocks * num_experts)) {}

  int64_t num_blocks, num_experts;
  double* z_sum;    // [num_blocks]
  Real* prob_sum;   // [num_blocks, E]
  int32_t* counts;  // [num_blocks, E]
};

constexpr int kMostSegments = 32;

struct SegmentSums {
  double prob_sum[kWarpSize];
  int64_t counts[kWarpSize];
};

template <typename Real>
FOMOE_DEVICE void add_z_sums(const GateSums<Real>& sums, Real* z_sum) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= kWarpSize) return;
  double sum = 0;
  for (int64_t block = lane; block < sums.num_blocks; block += kWarpSize) {
    sum += load_global(sums.z_sum + block);
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (lane == 0) store_global(z_sum, static_cast<Real>(sum));
}

/// A block owns 32 experts, one per lane, and each of its warps a segment of the blocks. The last
/// block adds up the z_sums.
template <typename Real>
__global__ void __launch_bounds__(kMostSegments* kWarpSize)
    gate_sums_kernel(GateSums<Real> sums, Real* prob_sum, int64_t* counts, Real* z_sum) {
  if (blockIdx.x == gridDim.x - 1) return add_z_sums(sums, z_sum);
  SegmentSums* segments = &dynamic_shared<SegmentSums>();
  const int lane = threadIdx.x % kWarpSize, segment = threadIdx.x / kWarpSize;
  const int num_segments = blockDim.x / kWarpSize;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const int64_t length = ceil_div(sums.num_blocks, num_segments);
  const int64_t begin = segment * length;
  const int64_t end = std::min(begin + length, sums.num_blocks);
  double prob = 0;
  int64_t count = 0;
  for (int64_t block = begin; block < end && expert < sums.num_experts; ++block) {
    const int64_t i = block * sums.num_experts + expert;
    prob += load_global(sums.prob_sum + i);
    count += load_global(sums.counts + i);
  }
  segments[segment].prob_sum[lane] = prob;
  segments[segment].counts[lane] = count;
  __syncthreads();
  if (segment != 0 || expert >= sums.num_experts) return;
  for (int i = 1; i < num_segments; ++i) {
    prob += segments[i].prob_sum[lane];
    count += segments[i].counts[lane];
  }
  store_global(prob_sum + expert, static_cast<Real>(prob));
  store_global(counts + expert, count);
}

template <typename Real>
void launch_gate_sums(const GateSums<Real>& sums, const GateResult& result, Stream stream) {
  const int num_segments = static_cast<int>(std::clamp<int64_t>(sums.num_blocks, 1, kMostSegments));
  launch({"topk_gate_sums", ceil_div(sums.num_experts, kWarpSize) + 1, num_segments * kWarpSize,
          num_segments * static_cast<int64_t>(sizeof(SegmentSums))},
         stream, gate_sums_kernel<Real>, sums, static_cast<Real*>(result.prob_sum), result.counts,
         static_cast<Real*>(result.z_sum));
}

}  // namespace fomoe::cuda
