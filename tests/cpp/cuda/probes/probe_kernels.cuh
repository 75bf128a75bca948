// SPDX-License-Identifier: Apache-2.0
// Each kernel does one thing that the emulation takes for granted. They run in one block, report a
// barrier that never completes in *status, and leave the judgement to the host.
#pragma once

#include "bounded.cuh"

namespace probes {

using fomoe::cuda::Major;

constexpr int kRows = 64, kDepth = 64;  // of a tile
constexpr int kTileBytes = kRows * 128;
constexpr int kStages = 4;

template <int cols>
struct ProductShared {
  BFloat16 a[kRows * kDepth];
  BFloat16 b[cols * kDepth];
  Mbarrier full;
  int gave_up;
};

/// sums of the thread as out [64, 2 * registers].
template <int registers>
FOMOE_DEVICE void store_sums(const float (&sums)[registers], int thread, float* out) {
  const int row = thread / 32 * 16 + thread % 32 / 4, col = thread % 4 * 2;
  for (int i = 0; i < registers; ++i) {
    out[(row + i % 4 / 2 * 8) * 2 * registers + i / 4 * 8 + col + i % 2] = sums[i];
  }
}

template <Major a_major, Major b_major, int registers>
FOMOE_DEVICE void multiply_tile(float (&sums)[registers], const BFloat16* a, const BFloat16* b,
                                bool accumulate) {
  using namespace fomoe::cuda;
  const uint64_t left = wgmma_descriptor<a_major>(wgmma_address(a), kTileBytes);
  const uint64_t right = wgmma_descriptor<b_major>(wgmma_address(b), kTileBytes);
  wgmma_fence(sums);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    wgmma<BFloat16, a_major, b_major>(sums, left + k * kStepBytes<a_major> / 16,
                                      right + k * kStepBytes<b_major> / 16, accumulate || k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
}

/// out [64, n] = a b with both operands by TMA; an MN-major b as slabs of 64 columns, one box.
template <Major a_major, Major b_major, int registers>
__global__ void __launch_bounds__(128)
    probe_wgmma(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                float* out, int* status) {
  using namespace fomoe::cuda;
  auto& shared = dynamic_shared<ProductShared<2 * registers>>();
  if (threadIdx.x == 0) {
    shared.gave_up = 0;
    init(shared.full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(shared.full, kTileBytes + 2 * registers * 128);
    tma_load(shared.a, a, shared.full, 0, 0);
    if constexpr (b_major == Major::kK) {
      tma_load(shared.b, b, shared.full, 0, 0);
    } else {
      tma_load(shared.b, b, shared.full, 0, 0, 0);
    }
  }
  if (!wait_bounded(shared.full, 0)) shared.gave_up = 1;
  __syncthreads();
  if (shared.gave_up) {
    *status = 1;
    return;
  }
  float sums[registers] = {};
  multiply_tile<a_major, b_major>(sums, shared.a, shared.b, false);
  store_sums(sums, static_cast<int>(threadIdx.x), out);
}

struct BoxShared {
  BFloat16 tile[kRows * 64];
  Mbarrier full;
  int gave_up;
};

struct Position {
  int x, y, z, w;
};

FOMOE_DEVICE void load_box(BoxShared& shared, const TensorMap& map, int rank, Position at) {
  using namespace fomoe::cuda;
  if (threadIdx.x == 0) {
    shared.gave_up = 0;
    init(shared.full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(shared.full, kTileBytes);  // whatever part of the box exists
    if (rank == 2) tma_load(shared.tile, map, shared.full, at.x, at.y);
#ifndef FOMOE_EMULATION
    if (rank == 4) tma_load_4d(shared.tile, map, shared.full, at.x, at.y, at.z, at.w);
#endif
  }
  if (!wait_bounded(shared.full, 0)) shared.gave_up = 1;
  __syncthreads();
}

/// out [64, 64] = the box at a position; the barrier has to count the bytes of a whole box.
__global__ void __launch_bounds__(128) probe_load(const __grid_constant__ TensorMap map, int rank,
                                                  Position at, BFloat16* out, int* status) {
  auto& shared = fomoe::cuda::dynamic_shared<BoxShared>();
  load_box(shared, map, rank, at);
  if (shared.gave_up) {
    *status = 1;
    return;
  }
  const char* bytes = reinterpret_cast<const char*>(shared.tile);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * 64; i += 128) {
    out[i] = *reinterpret_cast<const BFloat16*>(bytes + swizzled(i / 64, i % 64));
  }
}

/// The box at one position of a map, stored to another position of another map.
__global__ void __launch_bounds__(128)
    probe_store(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                int rank, Position at, int* status) {
  using namespace fomoe::cuda;
  auto& shared = dynamic_shared<BoxShared>();
  load_box(shared, from, 2, {});
  if (shared.gave_up) {
    *status = 1;
    return;
  }
  if (threadIdx.x == 0) {
    if (rank == 3) tma_store(to, shared.tile, at.x, at.y, at.z);
#ifndef FOMOE_EMULATION
    if (rank == 4) tma_store_4d(to, shared.tile, at.x, at.y, at.z, at.w);
#endif
    tma_commit();
    tma_wait_read<0>();
  }
}

struct GatherShared {
  BFloat16 a[kStages][kRows * kDepth];
  BFloat16 b[kStages][128 * kDepth];
  Mbarrier full[kStages], empty[kStages];
  int gave_up;
};

/// out [64, 128] = a [64, 64 tiles] b [128, 64 tiles]^T in float32: a by cp.async, whose arrival
/// on the barrier does not count itself (noinc), b by TMA, both into a ring of stages; the second
/// warpgroup copies, the first multiplies, with or without a proxy fence before it.
template <bool fences>
__global__ void __launch_bounds__(256)
    probe_gather(const BFloat16* a, const __grid_constant__ TensorMap b, int tiles, float* out,
                 int* status) {
  using namespace fomoe::cuda;
  auto& shared = dynamic_shared<GatherShared>();
  if (threadIdx.x == 0) {
    shared.gave_up = 0;
    for (int stage = 0; stage < kStages; ++stage) {
      init(shared.full[stage], 128 + 1);
      init(shared.empty[stage], 128);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x) % 128;
  bool over = true;
  if (threadIdx.x >= 128) {
    for (int t = 0; t < tiles && over; ++t) {
      const int stage = t % kStages, phase = t / kStages % 2;
      over = wait_bounded(shared.empty[stage], phase ^ 1);
      if (thread == 0) {
        arrive_and_expect(shared.full[stage], 128 * 128);
        tma_load(shared.b[stage], b, shared.full[stage], t * kDepth, 0);
      }
      for (int i = thread; i < kRows * 8; i += 128) {
        char* target = reinterpret_cast<char*>(shared.a[stage]) + swizzled(i / 8, i % 8 * 8);
        cp_async_16(target, a + (i / 8 * tiles + t) * kDepth + i % 8 * 8);
      }
      arrive_after_copies(shared.full[stage]);
    }
    if (!over) *status = 1;
    return;
  }
  float sums[64] = {};
  for (int t = 0; t < tiles; ++t) {
    const int stage = t % kStages;
    // wgmma needs all warps, so that none may leave the loop alone.
    over = over && wait_bounded(shared.full[stage], t / kStages % 2);
    if constexpr (fences) fence_async_proxy();
    multiply_tile<Major::kK, Major::kK>(sums, shared.a[stage], shared.b[stage], t > 0);
    arrive(shared.empty[stage]);
  }
  if (!over) *status = 1;
  store_sums(sums, thread, out);
}

}  // namespace probes
