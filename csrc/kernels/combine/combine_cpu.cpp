// SPDX-License-Identifier: Apache-2.0
// Forward: a thread owns a run of tokens and sums each in tiles of columns that stay in the first
// level cache. Backward: a thread owns a run of rows; every slot has at most one row, so that the
// weight gradients are written once.
#include "fomoe/combine.h"

#include "fomoe/parallel.h"
#include "fomoe/vectorize.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kTileColumns = 512;
constexpr int64_t kElementsPerThread = 16384;

template <typename T>
FOMOE_VECTORIZED void combine_tokens(const T* rows, const Accumulate<T>* weights,
                                     const Routing& routing, int64_t width, int64_t begin,
                                     int64_t end, T* y) {
  using Real = Accumulate<T>;
  Real sum[kTileColumns];
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t column = 0; column < width; column += kTileColumns) {
      const int64_t columns = std::min(kTileColumns, width - column);
      for (int64_t c = 0; c < columns; ++c) sum[c] = 0;
      for (int64_t slot = t * routing.top_k; slot < (t + 1) * routing.top_k; ++slot) {
        if (routing.slot_to_row[slot] < 0) continue;
        const T* row = rows + routing.slot_to_row[slot] * width + column;
        const Real weight = weights ? weights[slot] : Real(1);
        for (int64_t c = 0; c < columns; ++c) sum[c] += weight * to_accumulate(row[c]);
      }
      T* target = y + t * width + column;
      for (int64_t c = 0; c < columns; ++c) target[c] = from_accumulate<T>(sum[c]);
    }
  }
}

template <typename T>
FOMOE_VECTORIZED void combine_rows_backward(const T* grad_y, const T* rows,
                                            const Accumulate<T>* weights, const Routing& routing,
                                            int64_t width, int64_t begin, int64_t end, T* d_rows,
                                            Accumulate<T>* d_weights) {
  using Real = Accumulate<T>;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t slot = routing.row_to_slot[r];
    T* d_row = d_rows + r * width;
    if (slot < 0) {
      for (int64_t c = 0; c < width; ++c) d_row[c] = from_accumulate<T>(Real(0));
      continue;
    }
    const T* grad = grad_y + slot / routing.top_k * width;
    const T* row = rows + r * width;
    const Real weight = weights[slot];
    for (int64_t c = 0; c < width; ++c)
      d_row[c] = from_accumulate<T>(weight * to_accumulate(grad[c]));
    d_weights[slot] = sum_of<Real>(
        width, [&](int64_t c) { return to_accumulate(grad[c]) * to_accumulate(row[c]); });
  }
}

}  // namespace

void combine(DType dtype, const void* rows, const void* weights, const Routing& routing,
             int64_t width, void* y) {
  const int64_t elements_per_token = std::max<int64_t>(1, width * routing.top_k);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(routing.num_tokens, ceil_div(kElementsPerThread, elements_per_token),
                 [&](int64_t begin, int64_t end) {
                   combine_tokens(static_cast<const T*>(rows),
                                  static_cast<const Accumulate<T>*>(weights), routing, width, begin,
                                  end, static_cast<T*>(y));
                 });
  });
}

void combine_backward(DType dtype, const void* grad_y, const void* rows, const void* weights,
                      const Routing& routing, int64_t width, void* d_rows, void* d_weights) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    Real* d_slots = static_cast<Real*>(d_weights);
    std::fill_n(d_slots, routing.num_rows(), Real(0));  // a skipped slot has no row to write it
    parallel_for(routing.num_rows(), ceil_div(kElementsPerThread, std::max<int64_t>(1, width)),
                 [&](int64_t begin, int64_t end) {
                   combine_rows_backward(static_cast<const T*>(grad_y), static_cast<const T*>(rows),
                                         static_cast<const Real*>(weights), routing, width, begin,
                                         end, static_cast<T*>(d_rows), d_slots);
                 });
  });
}

}  // namespace fomoe::cpu
