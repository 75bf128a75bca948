// SPDX-License-Identifier: Apache-2.0
#include "fomoe/permute.h"

namespace fomoe::reference {

void permute(const double* x, const Routing& routing, int64_t width, double* rows) {
  for (int64_t row = 0; row < routing.num_rows(); ++row) {
    const int64_t slot = routing.row_to_slot[row];
    for (int64_t column = 0; column < width; ++column) {
      rows[row * width + column] = slot < 0 ? 0.0 : x[slot / routing.top_k * width + column];
    }
  }
}

}  // namespace fomoe::reference
