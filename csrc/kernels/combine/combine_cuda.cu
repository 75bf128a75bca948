// SPDX-License-Identifier: Apache-2.0
// Some warps own one token. Forward: they gather the token's rows in ascending k and write y once.
// Backward: they read the token's gradient once, and each of its rows once, for both the row's
// gradient and the weight's. kInFlight rows are loaded before the first is used.
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/memory.cuh"
#include "fomoe/combine.h"
#include "routing/row_of.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarpSize;
constexpr int kInFlight = 8;

/// The paths of kWarpSize slots, one in each lane.
template <typename Real>
struct LanePath {
  int32_t row;  // negative: skipped
  Real weight;  // then zero
};

template <typename Real>
FOMOE_DEVICE LanePath<Real> load_path(const Routing& routing, const Real* weights, int64_t slot,
                                      int64_t end) {
  const int32_t row = row_of(routing, slot, end);
  return {row, row < 0 ? Real(0) : weights ? load_global(weights + slot) : Real(1)};
}

/// Loads column `i` of the rows in lanes `first` and following; zero where there is none.
template <typename T, int count>
FOMOE_DEVICE void load_rows(const Elements<T, count>* rows, int64_t accesses, int64_t i,
                            const LanePath<Accumulate<T>>& path, int first,
                            Elements<T, count> (&loaded)[kInFlight]) {
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    const int64_t row = __shfl_sync(kAllLanes, path.row, first + k);
    loaded[k] = load_global_once_if(row >= 0 && i < accesses, rows + row * accesses + i);
  }
}

template <typename T, int count>
__global__ void __launch_bounds__(kMostThreads, 3)
    combine_kernel(const Elements<T, count>* rows, const Accumulate<T>* weights, Routing routing,
                   int64_t accesses, RowShape shape, Elements<T, count>* y) {
  using Real = Accumulate<T>;
  const int thread = threadIdx.x % shape.threads_per_row, lane = threadIdx.x % kWarpSize;
  // Warps without a token go along: the compiler should see that all lanes reach the shuffles.
  const int64_t token = shape.own_row(), first_slot = token * routing.top_k;
  const bool has_token = token < routing.num_tokens;
  const int64_t end_slot = first_slot + (has_token ? routing.top_k : 0);
  LanePath<Real> path = load_path(routing, weights, first_slot + lane, end_slot);
  for (int64_t turn = 0; turn < accesses; turn += shape.threads_per_row) {
    const int64_t i = turn + thread;
    Real sums[count] = {};
    for (int64_t k = 0; k < routing.top_k; k += kInFlight) {
      const int first = static_cast<int>(k % kWarpSize);
      if (first == 0 && routing.top_k > kWarpSize) {
        path = load_path(routing, weights, first_slot + k + lane, end_slot);
      }
      Elements<T, count> loaded[kInFlight];
      load_rows(rows, accesses, i, path, first, loaded);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const Real weight = __shfl_sync(kAllLanes, path.weight, first + j);
        Real values[count];
        widen(loaded[j], values);
        // A skipped path adds zero, which changes nothing: the sum began with zero, so it is not
        // -0.
#pragma unroll
        for (int c = 0; c < count; ++c) sums[c] += rounded_product(weight, values[c]);
      }
    }
    if (has_token && i < accesses) {
      store_global(y + token * accesses + i, narrow<T, count>(sums));
    }
  }
}

/// Sums kInFlight values over the lanes of a warp; lane l returns that of value l / 4. Every step
/// halves the values that a lane still adds up.
template <typename Real>
FOMOE_DEVICE Real warp_sums(Real (&values)[kInFlight]) {
  static_assert(kInFlight == 8);
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = kInFlight / 2; half > 0; half /= 2) {
    const bool is_upper = lane & (4 * half);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Real kept = is_upper ? values[i + half] : values[i];
      const Real given = is_upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, 4 * half);
    }
  }
  Real sum = values[0] + __shfl_xor_sync(kAllLanes, values[0], 2);
  return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

template <typename Real>
struct BackwardShared {
  Real dots[kMostWarps][kWarpSize];  // <grad_y, row>: each warp's part, for a lane's slot
};

template <typename T, int count>
__global__ void __launch_bounds__(kMostThreads, 2)
    combine_backward_kernel(const Elements<T, count>* grad_y, const Elements<T, count>* rows,
                            const Accumulate<T>* weights, Routing routing, int64_t accesses,
                            RowShape shape, Elements<T, count>* d_rows, Accumulate<T>* d_weights) {
  using Real = Accumulate<T>;
  auto& shared = dynamic_shared<BackwardShared<Real>>();
  const int threads = shape.threads_per_row, thread = threadIdx.x % threads;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t token = shape.own_row(), first_slot = token * routing.top_k;
  const bool has_token = token < routing.num_tokens;
  const int64_t end_slot = first_slot + (has_token ? routing.top_k : 0);
  for (int64_t k = 0; k < routing.top_k; k += kWarpSize) {
    const int64_t slot = first_slot + k;
    const int64_t left = routing.top_k - k;
    const int slots = left < kWarpSize ? static_cast<int>(left) : kWarpSize;
    const LanePath<Real> path = load_path(routing, weights, slot + lane, end_slot);
    store_shared(&shared.dots[warp][lane], Real(0));
    __syncwarp();

    for (int64_t turn = 0; turn < accesses; turn += threads) {
      const int64_t i = turn + thread;
      Real grad[count] = {};
      for (int first = 0; first < slots; first += kInFlight) {
        Elements<T, count> loaded[kInFlight];
        load_rows(rows, accesses, i, path, first, loaded);
        // After the loads of the rows, which should not wait for it.
        if (first == 0) {
          widen(load_global_once_if(has_token && i < accesses, grad_y + token * accesses + i),
                grad);
        }
        Real dots[kInFlight] = {};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int64_t row = __shfl_sync(kAllLanes, path.row, first + j);
          const Real weight = __shfl_sync(kAllLanes, path.weight, first + j);
          Real values[count], scaled[count];
          widen(loaded[j], values);
#pragma unroll
          for (int c = 0; c < count; ++c) {
            dots[j] += grad[c] * values[c];
            scaled[c] = weight * grad[c];
          }
          if (row >= 0 && i < accesses) {
            store_global(d_rows + row * accesses + i, narrow<T, count>(scaled));
          }
        }
        const Real sum = warp_sums(dots);
        Real* total = &shared.dots[warp][first + lane / 4];
        if (lane % 4 == 0) store_shared(total, load_shared(total) + sum);
      }
    }
    __syncthreads();

    if (has_token && thread < slots) {
      Real sum = 0;
      for (int w = 0; w < threads / kWarpSize; ++w)
        sum += load_shared(&shared.dots[warp + w][lane]);
      store_global(d_weights + slot + lane, path.row < 0 ? Real(0) : sum);
    }
    __syncthreads();
  }

  // The rows past the last executed one are shared out evenly, K to a token.
  const int64_t executed = load_global(routing.offsets + routing.num_local_experts);
  for (int64_t row = executed > first_slot ? executed : first_slot; row < end_slot; ++row) {
    for (int64_t i = thread; i < accesses; i += threads) {
      store_global(d_rows + row * accesses + i, Elements<T, count>{});
    }
  }
}

}  // namespace

void combine(DType dtype, const void* rows, const void* weights, const Routing& routing,
             int64_t width, void* y, Stream stream) {
  const int64_t row_bytes = width * size_of(dtype);
  if (row_bytes == 0) return;
  const int widest = widest_access(address_of(rows), address_of(y), row_bytes);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    with_elements_per_access<T>(widest, [&](auto count) {
      using Access = Elements<T, count>;
      const int64_t accesses = width / count;
      const RowShape shape(accesses);
      launch({"combine", shape.blocks(routing.num_tokens), shape.threads()}, stream,
             combine_kernel<T, count>, static_cast<const Access*>(rows),
             static_cast<const Accumulate<T>*>(weights), routing, accesses, shape,
             static_cast<Access*>(y));
    });
  });
}

void combine_backward(DType dtype, const void* grad_y, const void* rows, const void* weights,
                      const Routing& routing, int64_t width, void* d_rows, void* d_weights,
                      Stream stream) {
  const int widest = widest_access(address_of(grad_y), address_of(rows), address_of(d_rows),
                                   width * size_of(dtype));
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    with_elements_per_access<T>(widest, [&](auto count) {
      using Access = Elements<T, count>;
      const int64_t accesses = width / count;
      const RowShape shape(accesses);
      launch({"combine_backward", shape.blocks(routing.num_tokens), shape.threads(),
              sizeof(BackwardShared<Real>)},
             stream, combine_backward_kernel<T, count>, static_cast<const Access*>(grad_y),
             static_cast<const Access*>(rows), static_cast<const Real*>(weights), routing, accesses,
             shape, static_cast<Access*>(d_rows), static_cast<Real*>(d_weights));
    });
  });
}

}  // namespace fomoe::cuda
