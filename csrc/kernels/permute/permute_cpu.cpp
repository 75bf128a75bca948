// SPDX-License-Identifier: Apache-2.0
// A thread owns a run of rows and copies each with one memcpy; the element type does not matter.
#include "fomoe/permute.h"

#include <cstring>

#include "fomoe/parallel.h"

namespace fomoe::cpu {

void permute(DType dtype, const void* x, const Routing& routing, int64_t width, void* rows) {
  permute_range(dtype, x, routing, width, 0, routing.num_rows(), rows);
}

void permute_range(DType dtype, const void* x, const Routing& routing, int64_t width, int64_t first,
                   int64_t count, void* rows) {
  const int64_t row_bytes = width * size_of(dtype);
  if (row_bytes == 0) return;
  const char* source = static_cast<const char*>(x);
  char* target = static_cast<char*>(rows);
  const int64_t rows_per_thread = ceil_div(65536, row_bytes);
  parallel_for(count, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t slot = routing.row_to_slot[first + row];
      if (slot < 0) {
        std::memset(target + row * row_bytes, 0, row_bytes);
      } else {
        std::memcpy(target + row * row_bytes, source + slot / routing.top_k * row_bytes, row_bytes);
      }
    }
  });
}

}  // namespace fomoe::cpu
