// SPDX-License-Identifier: Apache-2.0
// A thread owns a run of rows and copies each with one memcpy; the element type does not matter.
#include "fomoe/permute.h"

#include <cstring>

#include "fomoe/parallel.h"

namespace fomoe::cpu {
namespace {
constexpr int64_t kRowsAhead = 4;
}

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
    // Tokens are scattered over memory, so that no processor foresees the next one.
    const auto fetch_row = [&](int64_t row) {
      const int32_t slot = row < end ? routing.row_to_slot[first + row] : -1;
      if (slot < 0) return;
      const char* data = source + slot / routing.top_k * row_bytes;
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(data + byte);
    };
    for (int64_t row = begin; row < end; ++row) {
      const int32_t slot = routing.row_to_slot[first + row];
      fetch_row(row + kRowsAhead);
      if (slot < 0) {
        std::memset(target + row * row_bytes, 0, row_bytes);
      } else {
        std::memcpy(target + row * row_bytes, source + slot / routing.top_k * row_bytes, row_bytes);
      }
    }
  });
}

}  // namespace fomoe::cpu
