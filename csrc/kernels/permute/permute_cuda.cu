// SPDX-License-Identifier: Apache-2.0
// A block owns one token: it reads the token's row once and writes it to the rows of its K slots.
// The rows past the last executed one are shared out evenly, K to a block, and zeroed.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/memory.cuh"
#include "fomoe/permute.h"

namespace fomoe::cuda {
namespace {

template <int bytes>
__global__ void __launch_bounds__(256)
    permute_kernel(const Packet<bytes>* x, Routing routing, int64_t packets, Packet<bytes>* rows) {
  const int64_t token = blockIdx.x, first_slot = token * routing.top_k;
  const int64_t num_rows = routing.num_rows();
  const int64_t executed = load_global(routing.offsets + routing.num_local_experts);
  for (int64_t i = threadIdx.x; i < packets; i += blockDim.x) {
    const Packet<bytes> value = load_global_once(x + token * packets + i);
    for (int64_t k = 0; k < routing.top_k; ++k) {
      const int64_t row = load_global(routing.slot_to_row + first_slot + k);
      if (0 <= row && row < num_rows) store_global(rows + row * packets + i, value);
    }
    for (int64_t row = first_slot; row < first_slot + routing.top_k; ++row) {
      if (row >= executed) store_global(rows + row * packets + i, Packet<bytes>{});
    }
  }
}

template <int bytes>
void launch_permute(const void* x, const Routing& routing, int64_t row_bytes, void* rows,
                    Stream stream) {
  const int64_t packets = row_bytes / bytes;
  const int threads = static_cast<int>(std::clamp<int64_t>(ceil_div(packets, 32) * 32, 32, 256));
  launch({"permute", routing.num_tokens, threads}, stream, permute_kernel<bytes>,
         static_cast<const Packet<bytes>*>(x), routing, packets, static_cast<Packet<bytes>*>(rows));
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
