// SPDX-License-Identifier: Apache-2.0
// Some warps own one token: they read the token's row once and write it to the rows of its K slots.
// The rows past the last executed one are shared out evenly, K to a token, and zeroed.
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/memory.cuh"
#include "fomoe/permute.h"
#include "routing/row_of.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kAtOnce = 8;

template <int bytes>
__global__ void __launch_bounds__(256)
    permute_kernel(const Packet<bytes>* x, Routing routing, int64_t packets, RowShape shape,
                   Packet<bytes>* rows) {
  const int thread = threadIdx.x % shape.threads_per_row, lane = threadIdx.x % kWarpSize;
  // Warps without a token go along: the compiler should see that all lanes reach the shuffles.
  const int64_t token = shape.own_row(), first_slot = token * routing.top_k;
  const bool has_token = token < routing.num_tokens;
  const int64_t end_slot = first_slot + (has_token ? routing.top_k : 0);
  const int64_t executed = load_global(routing.offsets + routing.num_local_experts);
  int32_t lane_row = row_of(routing, first_slot + lane, end_slot);
  for (int64_t turn = 0; turn < packets; turn += shape.threads_per_row) {
    const int64_t i = turn + thread;
    const Packet<bytes> value =
        load_global_once_if(has_token && i < packets, x + token * packets + i);
    for (int64_t k = 0; k < routing.top_k; k += kAtOnce) {
      const int first = static_cast<int>(k % kWarpSize);
      if (first == 0 && routing.top_k > kWarpSize) {
        lane_row = row_of(routing, first_slot + k + lane, end_slot);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t row = __shfl_sync(kAllLanes, lane_row, first + j);
        if (row >= 0 && i < packets) store_global(rows + row * packets + i, value);
      }
    }
  }
  for (int64_t row = executed > first_slot ? executed : first_slot; row < end_slot; ++row) {
    for (int64_t i = thread; i < packets; i += shape.threads_per_row) {
      store_global(rows + row * packets + i, Packet<bytes>{});
    }
  }
}

template <int bytes>
void launch_permute(const void* x, const Routing& routing, int64_t row_bytes, void* rows,
                    Stream stream) {
  const int64_t packets = row_bytes / bytes;
  const RowShape shape(packets);
  launch({"permute", shape.blocks(routing.num_tokens), shape.threads()}, stream,
         permute_kernel<bytes>, static_cast<const Packet<bytes>*>(x), routing, packets, shape,
         static_cast<Packet<bytes>*>(rows));
}

}  // namespace

void permute(DType dtype, const void* x, const Routing& routing, int64_t width, void* rows,
             Stream stream) {
  const int64_t row_bytes = width * size_of(dtype);
  if (row_bytes == 0) return;
  switch (widest_access(address_of(x), address_of(rows), row_bytes)) {
    case 16:
      return launch_permute<16>(x, routing, row_bytes, rows, stream);
    case 8:
      return launch_permute<8>(x, routing, row_bytes, rows, stream);
    case 4:
      return launch_permute<4>(x, routing, row_bytes, rows, stream);
    default:
      return launch_permute<2>(x, routing, row_bytes, rows, stream);
  }
}

}  // namespace fomoe::cuda
