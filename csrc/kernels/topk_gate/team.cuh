// SPDX-License-Identifier: Apache-2.0
// The threads that share a token: up to 32 lanes of a warp, or a whole block where experts or
// choices are many. Each holds kValues of the token's logits in registers.
#pragma once

#include "cuda/device.cuh"
#include "cuda/memory.cuh"

namespace fomoe::cuda {

constexpr int kValues = 16;
constexpr int64_t kScratchBytes = 64;  // of a block, for BlockTeam's reductions

/// 1, 2, 4, .. or 32 lanes; the teams of a warp run in step.
struct WarpTeam {
  static constexpr int kThreads = 128;  // of a block
  static constexpr int kMostExperts = kWarpSize * kValues;

  /// Lanes for so many experts.
  static int size_for(int64_t num_experts) {
    int size = 1;
    while (size * kValues < num_experts) size *= 2;
    return size;
  }
  static int teams_per_block(int size) { return kThreads / size; }

  FOMOE_DEVICE WarpTeam(int team_size, void* /*scratch*/)
      : size(team_size), rank(threadIdx.x % team_size), index(threadIdx.x / team_size) {}

  FOMOE_DEVICE void sync() const { __syncwarp(); }

  /// The same bits in every lane: combine must be commutative.
  template <typename T, typename Combine>
  FOMOE_DEVICE T reduce(T value, const Combine& combine) const {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
  }

  /// Whether it holds for any of the teams that run in step.
  FOMOE_DEVICE bool any_team(bool holds) const { return __any_sync(kAllLanes, holds); }

  int size, rank;
  int index;  // of the team in the block
};

struct BlockTeam {
  static constexpr int kThreads = 256;
  static constexpr int kMostExperts = kThreads * kValues;

  static int size_for(int64_t /*num_experts*/) { return kThreads; }
  static int teams_per_block(int /*size*/) { return 1; }

  FOMOE_DEVICE BlockTeam(int /*team_size*/, void* scratch)
      : rank(static_cast<int>(threadIdx.x)), scratch_(scratch) {}

  FOMOE_DEVICE void sync() const { __syncthreads(); }

  template <typename T, typename Combine>
  FOMOE_DEVICE T reduce(T value, const Combine& combine) const {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    T* warps = static_cast<T*>(scratch_);
    __syncthreads();  // the results of the previous reduction have been read
    if (rank % kWarpSize == 0) warps[rank / kWarpSize] = value;
    __syncthreads();
    value = warps[0];
    for (int warp = 1; warp < kThreads / kWarpSize; ++warp) value = combine(value, warps[warp]);
    return value;
  }

  FOMOE_DEVICE bool any_team(bool holds) const { return holds; }

  static constexpr int size = kThreads;
  int rank;
  static constexpr int index = 0;

 private:
  void* scratch_;
};

/// Blocks on a multiprocessor: enough for 128 registers a thread, or 256 where values are doubles.
template <typename Real, typename Team>
constexpr int kLeastBlocks = 2048 / (sizeof(Real) * Team::kThreads);

template <typename Team, typename Real>
FOMOE_DEVICE Real sum_over(const Team& team, Real value) {
  return team.reduce(value, [](Real a, Real b) { return a + b; });
}

template <typename Team, typename Real>
FOMOE_DEVICE Real largest_of(const Team& team, Real value) {
  return team.reduce(value, [](Real a, Real b) { return b > a ? b : a; });
}

}  // namespace fomoe::cuda
