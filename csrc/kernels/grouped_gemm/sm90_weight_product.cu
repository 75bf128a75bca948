// SPDX-License-Identifier: Apache-2.0
// WeightProduct on Hopper: both operands MN-major, lines of 64 columns of a row; the depth is the
// rows of an expert. Where all 64 rows of a step are the expert's, dense operands come by TMA; the
// last step and gathered operands by cp.async, with zeros beyond the expert's rows in both, because
// what lies there may be NaN.
#include "grouped_gemm/sm90_store.cuh"

namespace fomoe::cuda::sm90 {
namespace {

constexpr int kTileCols = 256;
using WeightPipeline = Pipeline<kTileCols, 4>;

struct Operand {
  TensorMap map;  // unless the rows are gathered
  Rows rows;
};

struct WeightArguments {
  Operand left, right;
  TensorMap out;
  const int32_t* offsets;
  int num_rows;
  int num_experts;
  int out_rows;
  uint32_t row_tiles, col_tiles;  // per expert
};

/// A tile of the output, and the rows that it is the sum over.
struct WeightPlace {
  int expert, first_row, first_col;
  int begin, end;

  FOMOE_DEVICE int steps() const { return (end - begin + kTileDepth - 1) / kTileDepth; }
};

FOMOE_DEVICE int clamped(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

FOMOE_DEVICE uint32_t count_of(const WeightArguments& p) {
  return p.num_experts * p.row_tiles * p.col_tiles;
}

FOMOE_DEVICE WeightPlace place_of(const WeightArguments& p, uint32_t tile) {
  const uint32_t per_expert = p.row_tiles * p.col_tiles, rest = tile % per_expert;
  const int expert = static_cast<int>(tile / per_expert);
  const int begin = clamped(load_global(p.offsets + expert), 0, p.num_rows);
  const int end = clamped(load_global(p.offsets + expert + 1), begin, p.num_rows);
  return {expert, static_cast<int>(rest % p.row_tiles) * kTileRows,
          static_cast<int>(rest / p.row_tiles) * kTileCols, begin, end};
}

/// Loads `slabs` slabs of 64 columns of 64 rows. Returns the bytes that TMA brings, which the
/// leading loader has to announce before it starts the loads.
template <int slabs>
struct SlabLoader {
  static constexpr int kLines = kTileDepth / 16;  // of each loader
  static constexpr int kBytes = slabs * kSlabBytes;

  FOMOE_DEVICE SlabLoader(const Operand& from, int first_row, int end)
      : operand(from),
        row(first_row),
        by_tma(from.rows.slots == nullptr && first_row + kTileDepth <= end) {
    if (by_tma) return;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int r = first_row + static_cast<int>(threadIdx.x) / 8 + 16 * i;
      indices[i] = r < end ? operand.rows.index(r) : -1;
    }
  }
  FOMOE_DEVICE void load(unsigned char* target, Mbarrier& full, int col) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      tma_load(target + i * kSlabBytes, operand.map, full, col + 64 * i, row);
    }
  }
  FOMOE_DEVICE void copy(unsigned char* target, int col) const {
    unsigned char* first = target + loader_offset();
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab) {
        operand.rows.copy_8(first + slab * kSlabBytes + 16 * i * kLineBytes, indices[i],
                            col + 64 * slab + static_cast<int>(threadIdx.x) % 8 * 8);
      }
    }
  }

  const Operand& operand;
  int row;
  bool by_tma;
  int indices[kLines];
};

FOMOE_DEVICE void load_tiles(const WeightArguments& p, WeightPipeline& pipeline) {
  const uint32_t count = count_of(p);
  Turn turn;
  for (uint32_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const WeightPlace place = place_of(p, tile);
#pragma unroll 1
    for (int row = place.begin; row < place.end; row += kTileDepth) {
      const SlabLoader<2> left(p.left, row, place.end);
      const SlabLoader<4> right(p.right, row, place.end);
      wait_empty(pipeline, turn);
      auto& stage = pipeline.stages[turn.stage];
      Mbarrier& full = pipeline.full[turn.stage];
      if (threadIdx.x == 0) {
        arrive_and_expect(full, left.by_tma * left.kBytes + right.by_tma * right.kBytes);
        if (left.by_tma) left.load(stage.a, full, place.first_row);
        if (right.by_tma) right.load(stage.b, full, place.first_col);
      }
      if (!left.by_tma) left.copy(stage.a, place.first_row);
      if (!right.by_tma) right.copy(stage.b, place.first_col);
      arrive_after_copies(full);
      turn.advance(pipeline);
    }
  }
}

template <typename T>
FOMOE_DEVICE void consume_tiles(const WeightArguments& p, WeightPipeline& pipeline,
                                Staging& staging) {
  const int consumer = own_warpgroup() - 1;
  const int warp_row = 64 * consumer + static_cast<int>(threadIdx.x) / kWarpSize % 4 * kChunkRows;
  const uint32_t count = count_of(p);
  ChunkStore chunks(staging);
  Turn turn;
  for (uint32_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const WeightPlace place = place_of(p, tile);
    const int steps = uniform(place.steps()), row = place.first_row + warp_row;
    const bool gathers = p.left.rows.slots != nullptr || p.right.rows.slots != nullptr;
    const bool is_even = (place.end - place.begin) % kTileDepth == 0;
    if (place.first_row + 64 * consumer >= p.out_rows) {
      skip_stages(pipeline, turn, steps);
      continue;
    }
    if (steps == 0) {
      const ChunkWords zeros = {};
#pragma unroll 1
      for (int i = 0; i < kTileCols / kChunkCols; ++i) {
        chunks.store(p.out, zeros, place.first_col + i * kChunkCols, row, place.expert);
      }
      continue;
    }
    float sums[kTileCols / 2];
    multiply_stages<T, Major::kMN, Major::kMN>(pipeline, turn, consumer, steps,
                                               gathers   ? 0
                                               : is_even ? steps
                                                         : steps - 1,
                                               sums);
#pragma unroll
    for (int i = 0; i < kTileCols / kChunkCols; ++i) {
      ChunkWords words;
      pack_chunk<T>(sums + 32 * i, words);
      chunks.store(p.out, words, place.first_col + i * kChunkCols, row, place.expert);
    }
  }
  chunks.finish();
}

struct WeightShared {
  WeightPipeline pipeline;
  Staging staging;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    weight_product_kernel(const __grid_constant__ WeightArguments p) {
  static_assert(sizeof(WeightShared) <= kMostSharedBytes);
  auto& shared = dynamic_shared<WeightShared>();
  prepare(shared.pipeline, 1 + kLoaders);
  if (own_warpgroup() == 0) {
    release_registers<kLoaderRegisters>();
    load_tiles(p, shared.pipeline);
  } else {
    claim_registers<kConsumerRegisters>();
    consume_tiles<T>(p, shared.pipeline, shared.staging);
  }
}

Operand operand_of(DType dtype, const RowSource& source, int64_t width) {
  Operand operand = {};
  operand.rows = rows_of(source, width);
  if (source.slots == nullptr && source.count > 0) {
    operand.map =
        make_tensor_map(dtype, source.data, {{width, 1, 64}, {source.count, width, kTileDepth}});
  }
  return operand;
}

}  // namespace

void multiply(const WeightProduct& product, Stream stream) {
  if (product.num_experts == 0 || product.out_rows == 0 || product.out_cols == 0) return;
  WeightArguments p = {};
  p.left = operand_of(product.dtype, product.left, product.out_rows);
  p.right = operand_of(product.dtype, product.right, product.out_cols);
  p.out = make_tensor_map(product.dtype, product.out,
                          {{product.out_cols, 1, kChunkCols},
                           {product.out_rows, product.out_cols, kChunkRows},
                           {product.num_experts, product.out_rows * product.out_cols, 1}});
  p.offsets = product.offsets;
  p.num_rows = static_cast<int>(product.num_rows);
  p.num_experts = static_cast<int>(product.num_experts);
  p.out_rows = static_cast<int>(product.out_rows);
  p.row_tiles = static_cast<uint32_t>(ceil_div(product.out_rows, kTileRows));
  p.col_tiles = static_cast<uint32_t>(ceil_div(product.out_cols, kTileCols));
  const int64_t tiles = product.num_experts * p.row_tiles * p.col_tiles;
  check_tiles(tiles);
  const LaunchShape shape = {"sm90_weight_product",
                             std::min<int64_t>(tiles, multiprocessor_count()), kThreads,
                             sizeof(WeightShared)};
  if (product.dtype == DType::kBFloat16) {
    launch(shape, stream, weight_product_kernel<BFloat16>, p);
  } else {
    launch(shape, stream, weight_product_kernel<Float16>, p);
  }
}

}  // namespace fomoe::cuda::sm90
