// SPDX-License-Identifier: Apache-2.0
#include "fomoe/combine.h"

namespace fomoe::reference {

void combine(const double* rows, const double* weights, const Routing& routing, int64_t width,
             double* y) {
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    for (int64_t column = 0; column < width; ++column) {
      double sum = 0;
      for (int64_t slot = t * routing.top_k; slot < (t + 1) * routing.top_k; ++slot) {
        const int64_t row = routing.slot_to_row[slot];
        if (row >= 0) sum += (weights ? weights[slot] : 1.0) * rows[row * width + column];
      }
      y[t * width + column] = sum;
    }
  }
}

void combine_backward(const double* grad_y, const double* rows, const double* weights,
                      const Routing& routing, int64_t width, double* d_rows, double* d_weights) {
  for (int64_t i = 0; i < routing.num_rows() * width; ++i) d_rows[i] = 0;
  for (int64_t slot = 0; slot < routing.num_rows(); ++slot) {
    d_weights[slot] = 0;
    const int64_t row = routing.slot_to_row[slot], t = slot / routing.top_k;
    for (int64_t column = 0; column < width && row >= 0; ++column) {
      d_rows[row * width + column] = weights[slot] * grad_y[t * width + column];
      d_weights[slot] += rows[row * width + column] * grad_y[t * width + column];
    }
  }
}

}  // namespace fomoe::reference
