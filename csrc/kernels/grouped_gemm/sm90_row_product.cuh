// SPDX-License-Identifier: Apache-2.0
// RowProduct on Hopper. The operand rows come by TMA, or, gathered, by cp.async from all loaders;
// the experts' matrices by TMA in both layouts. A tile of columns is made of boxes of 128: adjacent
// ones, or for a gated activation one of gate and one of up, which then lie in the same threads.
#pragma once

#include "grouped_gemm/sm90_store.cuh"

namespace fomoe::cuda::sm90 {

inline constexpr int kBoxCols = 128;

/// Arguments of the kernels of all epilogues.
struct RowArguments {
  TensorMap a, b;  // a: unless the rows are gathered
  RowOutput out;   // out or hidden
  RowOutput pre;   // kActivate: pre, if it is wanted; kActivateBackward: d_pre
  Rows source;
  RowTiles tiles;
  int steps;  // stages of the depth
  int col_tiles;
  int cols_per_tile;  // from one tile's first column to the next's
  int cols_per_box;   // from one box's first column to the next's, in a tile
  int expert_step;    // 0 if all experts have the same matrix
  const unsigned char* bias;
  int cols;
  Activation activation;
  bool wants_pre;
  const unsigned char* saved_pre;  // kActivateBackward
  const float* weights;
  float* weight_parts;
};

/// One tile of the product.
struct RowPlace {
  RowTile rows;
  int col_tile;
};

/// The tiles in bands of 16 row tiles, column by column within a band, so that blocks that run at
/// the same time share both operands in the L2 cache.
struct RowWalk {
  const RowArguments& p;
  uint32_t row_tiles, count;

  FOMOE_DEVICE explicit RowWalk(const RowArguments& arguments) : p(arguments) {
    const int64_t most = p.tiles.most, listed = load_global(p.tiles.count);
    row_tiles = static_cast<uint32_t>(listed < 0 ? 0 : listed < most ? listed : most);
    count = row_tiles * p.col_tiles;
  }
  FOMOE_DEVICE RowPlace operator[](uint32_t tile) const {
    constexpr uint32_t kBand = 16;
    const uint32_t in_band = kBand * p.col_tiles, band = tile / in_band, rest = tile % in_band;
    const uint32_t left = row_tiles - band * kBand, height = left < kBand ? left : kBand;
    return {load_global(p.tiles.tiles + band * kBand + rest % height),
            static_cast<int>(rest / height)};
  }
};

/// Loads the tile's columns of one stage of b.
template <Major b_major, typename Pipeline>
FOMOE_DEVICE void load_b(const RowArguments& p, Pipeline& pipeline, const Turn& turn, int col,
                         int depth, int expert) {
  unsigned char* b = pipeline.stages[turn.stage].b;
  Mbarrier& full = pipeline.full[turn.stage];
#pragma unroll
  for (int box = 0; box < Pipeline::kCols / kBoxCols; ++box, col += p.cols_per_box) {
    if constexpr (b_major == Major::kK) {
      tma_load(b + box * kBoxCols * kLineBytes, p.b, full, depth, col, expert);
    } else {
      tma_load(b + 2 * box * kSlabBytes, p.b, full, col, depth, expert);
      tma_load(b + (2 * box + 1) * kSlabBytes, p.b, full, col + 64, depth, expert);
    }
  }
}

template <Major b_major, typename Pipeline>
FOMOE_DEVICE void load_tiles(const RowArguments& p, Pipeline& pipeline) {
  constexpr int kLoads = kTileRows * kLineBytes / 16 / kLoaders;  // of each loader, per stage
  const bool gathers = p.source.slots != nullptr, leads = threadIdx.x == 0;
  if (!gathers && !leads) return;
  if (leads) {
    if (!gathers) tma_prefetch(p.a);
    tma_prefetch(p.b);
  }
  const RowWalk walk(p);
  const int line = threadIdx.x / 8, offset = loader_offset();
  Turn turn;
  for (uint32_t tile = blockIdx.x; tile < walk.count; tile += gridDim.x) {
    const RowPlace place = walk[tile];
    int rows[kLoads];
    if (gathers) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = place.rows.begin + line + 16 * i;
        rows[i] = row < place.rows.end ? p.source.index(row) : -1;
      }
    }
#pragma unroll 1
    for (int k = 0; k < p.steps; ++k) {
      wait_empty(pipeline, turn);
      unsigned char* a = pipeline.stages[turn.stage].a;
      Mbarrier& full = pipeline.full[turn.stage];
      if (leads) {
        arrive_and_expect(full,
                          Pipeline::kCols * kLineBytes + (gathers ? 0 : kTileRows * kLineBytes));
        load_b<b_major>(p, pipeline, turn, place.col_tile * p.cols_per_tile, k * kTileDepth,
                        place.rows.expert * p.expert_step);
        if (!gathers) tma_load(a, p.a, full, k * kTileDepth, place.rows.begin);
      }
      if (gathers) {
        const int col = k * kTileDepth + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          p.source.copy_8(a + offset + 16 * i * kLineBytes, rows[i], col);
        }
        arrive_after_copies(full);
      }
      turn.advance(pipeline);
    }
  }
}

/// A tile as an epilogue sees it, from one warp.
struct WarpTile {
  int row;   // first of the warp
  int rows;  // of them, at most 16; may be negative
  int expert;
  int col_tile;
  int first_col;
};

/// sums += bias, whose columns lie as those of the boxes.
template <typename T, int registers>
FOMOE_DEVICE void add_bias(const RowArguments& p, const WarpTile& tile, float (&sums)[registers]) {
  if (p.bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < registers / 4; ++j) {
    const int box = j / (kBoxCols / 8), in_box = j % (kBoxCols / 8) * 8;
    const int col = tile.first_col + box * p.cols_per_box + in_box;
    if (col >= p.cols) continue;
    const int64_t element = int64_t{tile.expert} * p.cols + col + threadIdx.x % 4 * 2;
    const Pair bias =
        unpack<T>(load_global(reinterpret_cast<const uint32_t*>(p.bias + 2 * element)));
    sums[4 * j] += bias.first;
    sums[4 * j + 1] += bias.second;
    sums[4 * j + 2] += bias.first;
    sums[4 * j + 3] += bias.second;
  }
}

/// Epilogue: kCols, kNumStages, a struct Shared with a member `staging`, and
///   void begin(p, tile)        before the sums are there
///   void end(p, tile, sums)    with them
/// Made once per thread from (shared), and finish() at the end.
template <typename T, Major b_major, typename Epilogue>
FOMOE_DEVICE void consume_tiles(const RowArguments& p, typename Epilogue::Pipeline& pipeline,
                                typename Epilogue::Shared& shared) {
  const RowWalk walk(p);
  const uint32_t count = uniform(walk.count);
  const int consumer = own_warpgroup() - 1;
  const int warp_row = 64 * consumer + static_cast<int>(threadIdx.x) / kWarpSize % 4 * kChunkRows;
  Epilogue epilogue(shared);
  Turn turn;
  for (uint32_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const RowPlace place = walk[tile];
    const int first_row = uniform(place.rows.begin), end = uniform(place.rows.end);
    if (first_row + 64 * consumer >= end) {
      skip_stages(pipeline, turn, p.steps);
      continue;
    }
    const int row = first_row + warp_row;
    const WarpTile warp_tile = {row, end - row, place.rows.expert, place.col_tile,
                                place.col_tile * p.cols_per_tile};
    epilogue.begin(p, warp_tile);
    float sums[Epilogue::kCols / 2];
    multiply_stages<T, Major::kK, b_major>(pipeline, turn, consumer, p.steps,
                                           p.source.slots != nullptr ? 0 : p.steps, sums);
    add_bias<T>(p, warp_tile, sums);
    epilogue.end(p, warp_tile, sums);
  }
  epilogue.finish();
}

template <typename Epilogue>
struct RowShared {
  typename Epilogue::Pipeline pipeline;
  typename Epilogue::Shared epilogue;
};

template <typename T, Major b_major, template <typename> class EpilogueOf>
__global__ void __launch_bounds__(kThreads, 1)
    row_product_kernel(const __grid_constant__ RowArguments p) {
  using Epilogue = EpilogueOf<T>;
  static_assert(sizeof(RowShared<Epilogue>) <= kMostSharedBytes);
  auto& shared = dynamic_shared<RowShared<Epilogue>>();
  prepare(shared.pipeline, p.source.slots != nullptr ? 1 + kLoaders : 1);
  if (own_warpgroup() == 0) {
    release_registers<kLoaderRegisters>();
    load_tiles<b_major>(p, shared.pipeline);
  } else {
    claim_registers<kConsumerRegisters>();
    consume_tiles<T, b_major, Epilogue>(p, shared.pipeline, shared.epilogue);
  }
}

/// How many columns a tile advances by, and its boxes.
struct ColumnTiles {
  int64_t count, cols_per_tile, cols_per_box;
};

/// Arguments that do not depend on the epilogue.
RowArguments row_arguments(const RowProduct& product, const ColumnTiles& columns);

template <template <typename> class EpilogueOf>
void launch_row_product(const char* name, const RowProduct& product, const RowArguments& arguments,
                        Stream stream) {
  const int64_t tiles = product.tiles.most * arguments.col_tiles;
  check_tiles(tiles);
  const auto run = [&](auto element, auto major) {
    using T = decltype(element);
    constexpr Major kMajor = decltype(major)::value;
    launch({name, std::min<int64_t>(tiles, multiprocessor_count()), kThreads,
            sizeof(RowShared<EpilogueOf<T>>)},
           stream, row_product_kernel<T, kMajor, EpilogueOf>, arguments);
  };
  const auto run_major = [&](auto element) {
    if (product.b.row_stride == 1) {
      run(element, std::integral_constant<Major, Major::kK>{});
    } else {
      run(element, std::integral_constant<Major, Major::kMN>{});
    }
  };
  product.dtype() == DType::kBFloat16 ? run_major(BFloat16{}) : run_major(Float16{});
}

void store(const RowProduct& product, Stream stream);
void activate(const RowProduct& product, Stream stream);
void activate_backward(const RowProduct& product, Stream stream);

}  // namespace fomoe::cuda::sm90
