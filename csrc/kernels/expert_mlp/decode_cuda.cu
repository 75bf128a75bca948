// SPDX-License-Identifier: Apache-2.0
// A warp owns 4 columns of the product, rows of the matrix in memory, and reads them 16 bytes per
// lane, past the L1 cache, which keeps the tokens. Each lane adds the terms of its pieces for all
// tokens at once; the lanes' sums are added in a fixed tree, which leaves each sum in lanes of its
// own. Blocks are small and many: one expert alone fills the GPU.
#include "expert_mlp/decode_cuda.h"

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/memory.cuh"
#include "expert_mlp/activated.h"
#include "grouped_gemm/expert_rows.cuh"

namespace fomoe::cuda::decode {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kColumns = 4;  // of a warp
constexpr int kPerLoad = 8;  // elements

/// What the warp computes: columns column(0).. of rows [begin, end), at most kTokens.
struct WarpTask {
  int64_t expert, begin, end;
  int64_t first;     // feature
  int64_t features;  // F of gates and ups, else all columns
  bool is_paired;    // columns 0 and 1 are gates, 2 and 3 their ups

  FOMOE_DEVICE int64_t feature(int c) const { return first + (is_paired ? c % 2 : c); }
  FOMOE_DEVICE int64_t column(int c) const {
    return feature(c) + (is_paired && c >= 2 ? features : 0);
  }
};

FOMOE_DEVICE float activated_by(Activation activation, float gate, float up) {
  switch (activation) {
    case Activation::kSilu:
      return activated<Activation::kSilu>(gate, up).value;
    case Activation::kSwigluClamped:
      return activated<Activation::kSwigluClamped>(gate, up).value;
    default:
      return activated<Activation::kSwiglu>(gate, up).value;
  }
}

/// Row of the source that a row of the product is made of, or -1 for zeros.
FOMOE_DEVICE int64_t source_row(const RowSource& source, int64_t row) {
  if (source.slots == nullptr) return row;
  const int32_t slot = load_global(source.slots + row);
  const bool exists = 0 <= slot && slot < source.count * source.top_k;
  return exists ? slot / static_cast<int32_t>(source.top_k) : -1;
}

/// Adds the lanes' values: lanes `distance` apart share them out, each adds its half. Afterwards
/// lane l has the sum of values[l / (32 / count)].
template <int count, int distance = kWarpSize / 2>
FOMOE_DEVICE float add_lanes(const float (&values)[count]) {
  if constexpr (distance == 0) {
    return values[0];
  } else if constexpr (count == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(kAllLanes, values[0], distance)};
    return add_lanes<1, distance / 2>(sum);
  } else {
    const bool is_upper = (threadIdx.x & distance) != 0;
    float sums[count / 2];
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float kept = is_upper ? values[i + count / 2] : values[i];
      const float sent = is_upper ? values[i] : values[i + count / 2];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
    }
    return add_lanes<count / 2, distance / 2>(sums);
  }
}

/// The lane's share of the warp's kColumns * tokens sums, by column, then token.
template <typename T, int tokens>
FOMOE_DEVICE void add_terms(const RowProduct& product, const WarpTask& task,
                            float (&sums)[kColumns * tokens]) {
  using Piece = Elements<T, kPerLoad>;
  const ExpertMatrices& b = product.b;
  const T* matrix = static_cast<const T*>(b.data) + task.expert * b.expert_stride;
  const T *columns[kColumns], *rows[tokens];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) columns[c] = matrix + task.column(c) * b.col_stride;
#pragma unroll
  for (int t = 0; t < tokens; ++t) {
    // Sums of rows that do not exist come to nothing later: that way no load has a condition.
    const int64_t row = task.begin + t < task.end ? task.begin + t : task.begin;
    const int64_t token = source_row(product.source, row);
    rows[t] = static_cast<const T*>(product.source.data) + (token < 0 ? 0 : token) * b.rows;
  }
#pragma unroll
  for (int i = 0; i < kColumns * tokens; ++i) sums[i] = 0;
#pragma unroll 1
  for (int64_t k = threadIdx.x % kWarpSize * kPerLoad; k < b.rows; k += kWarpSize * kPerLoad) {
    Piece pieces[kColumns], inputs[tokens];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      pieces[c] = load_global_past_l1(reinterpret_cast<const Piece*>(columns[c] + k));
    }
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      inputs[t] = load_global(reinterpret_cast<const Piece*>(rows[t] + k));
    }
#pragma unroll
    for (int i = 0; i < kPerLoad / 2; ++i) {
      Pair weights[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) weights[c] = unpack<T>(pieces[c].parts[i]);
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        const Pair values = unpack<T>(inputs[t].parts[i]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sums[c * tokens + t] += weights[c].first * values.first;
          sums[c * tokens + t] += weights[c].second * values.second;
        }
      }
    }
  }
}

template <typename T, Epilogue epilogue, int tokens>
FOMOE_DEVICE void multiply_rows(const RowProduct& product, const WarpTask& task) {
  constexpr int kLanes = kWarpSize / (kColumns * tokens);  // that hold the same sum
  float sums[kColumns * tokens];
  add_terms<T, tokens>(product, task, sums);
  float sum = add_lanes<kColumns * tokens>(sums);
  const int lane = threadIdx.x % kWarpSize, c = lane / kLanes / tokens;
  const int64_t row = task.begin + lane / kLanes % tokens, cols = product.b.cols;
  const int64_t column = task.column(c);
  if (row < task.end && source_row(product.source, row) < 0) sum = 0;
  if (product.bias) {
    const T* bias = static_cast<const T*>(product.bias) + task.expert * cols;
    sum += to_accumulate(load_global(bias + column));
  }
  const T value = from_accumulate<T>(sum);
  const bool is_owner = lane % kLanes == 0 && row < task.end;
  if constexpr (epilogue == Epilogue::kStore) {
    if (is_owner) store_global(static_cast<T*>(product.out) + row * cols + column, value);
  } else {
    // The up of a gate is in the other half of the warp.
    const float gate = to_accumulate(value), up = __shfl_xor_sync(kAllLanes, gate, kWarpSize / 2);
    if (is_owner && product.pre) {
      store_global(static_cast<T*>(product.pre) + row * cols + column, value);
    }
    if (is_owner && !(task.is_paired && c >= 2)) {
      store_global(static_cast<T*>(product.hidden) + row * task.features + column,
                   from_accumulate<T>(activated_by(product.activation, gate, up)));
    }
  }
}

/// The expert that row is of, or num_experts; the same for all lanes.
FOMOE_DEVICE int64_t expert_of(const int32_t* offsets, int64_t num_experts, int64_t row) {
  int before = 0;
  for (int64_t e = threadIdx.x % kWarpSize; e < num_experts; e += kWarpSize) {
    before += load_global(offsets + e + 1) <= row;
  }
  return __reduce_add_sync(kAllLanes, before);
}

/// How the blocks share the work: `slices` to an expert, which is found by its index or, where
/// there are fewer rows than experts, by its first row.
struct Division {
  int64_t features;
  unsigned slices;
  bool is_paired, by_row;
};

template <typename T, Epilogue epilogue>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    decode_kernel(const __grid_constant__ RowProduct product, const int32_t* offsets,
                  const Division division) {
  const unsigned item = blockIdx.x / division.slices, slice = blockIdx.x % division.slices;
  const int64_t num_experts = product.b.num_experts;
  const int64_t expert = division.by_row ? expert_of(offsets, num_experts, item) : item;
  if (expert >= num_experts) return;
  const ExpertRows rows = rows_of(offsets, expert, product.num_rows);
  if (division.by_row && rows.begin != item) return;  // the block of its first row does it
  const int64_t width = division.is_paired ? kColumns / 2 : kColumns;
  const int64_t first = (int64_t{slice} * kWarps + threadIdx.x / kWarpSize) * width;
  if (first >= division.features) return;
  for (int64_t row = rows.begin; row < rows.end; row += kTokens) {
    const WarpTask task = {expert,
                           row,
                           row + kTokens < rows.end ? row + kTokens : rows.end,
                           first,
                           division.features,
                           division.is_paired};
    if (task.end - row == 1) {
      multiply_rows<T, epilogue, 1>(product, task);
    } else if (task.end - row == 2) {
      multiply_rows<T, epilogue, 2>(product, task);
    } else {
      multiply_rows<T, epilogue, kTokens>(product, task);
    }
  }
}

template <typename T>
void launch_for(const RowProduct& product, const int32_t* offsets, Stream stream) {
  const bool activates = product.epilogue == Epilogue::kActivate;
  const bool is_paired = activates && is_gated(product.activation);
  const int64_t features = is_paired ? product.cols() / 2 : product.cols();
  const int64_t slices = ceil_div(features, kWarps * (is_paired ? kColumns / 2 : kColumns));
  const int64_t num_experts = product.b.num_experts;
  const Division division = {features, static_cast<unsigned>(slices), is_paired,
                             product.num_rows < num_experts};
  const int64_t blocks = slices * std::min(product.num_rows, num_experts);
  if (activates) {
    launch({"decode_activate", blocks, kThreads}, stream, decode_kernel<T, Epilogue::kActivate>,
           product, offsets, division);
  } else {
    launch({"decode_store", blocks, kThreads}, stream, decode_kernel<T, Epilogue::kStore>, product,
           offsets, division);
  }
}

}  // namespace

bool is_faster(KernelPath path, const ExpertMatrices& b, int64_t num_rows) {
  return path != KernelPath::kSimple && b.row_stride == 1 && is_decode(num_rows, b.num_experts);
}

void multiply(const RowProduct& product, const int32_t* offsets, Stream stream) {
  if (product.dtype() == DType::kBFloat16) return launch_for<BFloat16>(product, offsets, stream);
  launch_for<Float16>(product, offsets, stream);
}

}  // namespace fomoe::cuda::decode
