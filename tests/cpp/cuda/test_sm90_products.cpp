// SPDX-License-Identifier: Apache-2.0
#include "cuda/product_cases.h"

namespace {

using namespace product_cases;

const Family kSm90 = {
    fomoe::cuda::sm90::num_weight_parts,
    [](const RowProduct& product) { fomoe::cuda::sm90::multiply(product, nullptr); },
    [](const WeightProduct& product) { fomoe::cuda::sm90::multiply(product, nullptr); }};

constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16};

/// More tiles than a ring has stages and a grid has blocks, in both layouts of b.
std::vector<RowCase> long_row_cases() {
  const Rows dense = {{70, 140, 3}}, gathered = {{70, 140, 3}, 2};
  RowCase activate = {.rows = {{130, 3}, 2}, .depth = 72, .cols = 2 * 200};
  activate.epilogue = Epilogue::kActivate;
  activate.has_bias = true;
  RowCase backward = {.rows = {{130, 3}, 2}, .depth = 328, .cols = 264, .is_transposed = true};
  backward.epilogue = Epilogue::kActivateBackward;
  return {
      {.rows = dense, .depth = 328, .cols = 264, .is_transposed = true, .has_bias = true},
      {.rows = gathered, .depth = 328, .cols = 264},
      {.rows = {std::vector<int32_t>(20, 1)}, .depth = 8, .cols = 264},  // two bands
      activate,
      backward,
  };
}

std::vector<WeightCase> long_weight_cases() {
  return {
      {.rows = {{330, 0, 64}}, .gathers_left = false, .out_rows = 136, .out_cols = 264},
      {.rows = {{321, 7}, 2}, .gathers_left = true, .out_rows = 136, .out_cols = 8},
  };
}

}  // namespace

TEST(rows_meet_the_matrices_of_their_experts) {
  for (const DType dtype : kTypes) check_all(kSm90, dtype, aligned_row_cases());
}

TEST(the_rows_of_each_expert_meet_each_other) {
  for (const DType dtype : kTypes) check_all(kSm90, dtype, aligned_weight_cases());
}

TEST(blocks_multiply_one_tile_after_the_other) {
  check_all(kSm90, DType::kBFloat16, long_row_cases());
  check_all(kSm90, DType::kBFloat16, long_weight_cases());
}

TEST(experts_may_share_one_matrix) {
  const int64_t depth = 16, cols = 8;
  const DType dtype = DType::kBFloat16;
  const on_device::Array source(dtype, harness::random_values(3 * depth, 1));
  const on_device::Array b(dtype, harness::random_values(depth * cols, 2));
  const on_device::Vector<int32_t> count(std::vector<int32_t>{2});
  const on_device::Vector<fomoe::cuda::RowTile> tiles(
      std::vector<fomoe::cuda::RowTile>{{0, 0, 2, 0}, {1, 2, 3, 0}});
  const auto multiply = [&](int64_t num_experts, const fomoe::cuda::RowTiles& row_tiles) {
    on_device::Array out(dtype, 3 * cols);
    RowProduct product = {};
    product.source = {source.data(), 3, nullptr, 0};
    product.b = {dtype, b.data(), num_experts, depth, cols, 0, cols, 1};
    product.num_rows = 3;
    product.tiles = row_tiles;
    product.out = out.data();
    fomoe::cuda::sm90::multiply(product, nullptr);
    return out.values();
  };
  const on_device::Vector<int32_t> one(std::vector<int32_t>{1});
  const on_device::Vector<fomoe::cuda::RowTile> tile(
      std::vector<fomoe::cuda::RowTile>{{0, 0, 3, 0}});
  CHECK(multiply(2, {tiles.data(), count.data(), 2}) == multiply(1, {tile.data(), one.data(), 1}));
}
