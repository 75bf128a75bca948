// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "grouped_gemm/products.h"

namespace {

using namespace fomoe::cuda;
using fomoe::Activation;
using fomoe::DType;

struct Case {
  DType dtype = DType::kBFloat16;
  std::vector<int32_t> offsets = {0, 40, 40, 57};  // of the experts
  int64_t num_rows = 60, depth = 40, cols = 72;
  int64_t num_tokens = 30, top_k = 2;
  bool gathered = true, along_depth = true, bias = true;
  Epilogue epilogue = Epilogue::kStore;
  Activation activation = Activation::kSwiglu;

  int64_t num_experts() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

std::vector<RowTile> tiles_of(const Case& c) {
  std::vector<RowTile> tiles;
  for (int32_t e = 0; e < c.num_experts(); ++e) {
    for (int32_t begin = c.offsets[e]; begin < c.offsets[e + 1]; begin += kTileRows) {
      tiles.push_back({e, begin, std::min(begin + kTileRows, c.offsets[e + 1]), 0});
    }
  }
  return tiles;
}

std::vector<int32_t> random_slots(const Case& c) {
  std::vector<int32_t> slots = samples::random_ids(c.num_rows, c.num_tokens * c.top_k, 3);
  return slots;  // -1 here and there
}

void check_store(const Case& c) {
  const int64_t source_rows = c.gathered ? c.num_tokens : c.num_rows, E = c.num_experts();
  const on_device::Array source(c.dtype, harness::random_values(source_rows * c.depth, 1));
  const on_device::Array b(c.dtype, harness::random_values(E * c.depth * c.cols, 2));
  const on_device::Array bias(c.dtype, harness::random_values(E * c.cols, 4));
  const std::vector<int32_t> slots = random_slots(c);
  const on_device::Vector<int32_t> device_slots(slots);
  const std::vector<RowTile> tiles = tiles_of(c);
  const on_device::Vector<RowTile> device_tiles(tiles);
  const on_device::Vector<int32_t> count(std::vector<int32_t>{static_cast<int32_t>(tiles.size())});
  const on_device::Array out(c.dtype, c.num_rows * c.cols);
  RowProduct product = {};
  product.source = {source.data(), source_rows, c.gathered ? device_slots.data() : nullptr,
                    c.top_k};
  product.b = {c.dtype,
               b.data(),
               E,
               c.depth,
               c.cols,
               c.depth * c.cols,
               c.along_depth ? 1 : c.cols,
               c.along_depth ? c.depth : 1};
  product.bias = c.bias ? bias.data() : nullptr;
  product.num_rows = c.num_rows;
  product.tiles = {device_tiles.data(), count.data(), most_row_tiles(c.num_rows, E)};
  product.out = out.data();
  sm80::multiply(product, nullptr);

  const auto x = source.values(), w = b.values(), beta = bias.values(), actual = out.values();
  double worst = 0;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t r = c.offsets[e]; r < c.offsets[e + 1]; ++r) {
      const int64_t row = !c.gathered ? r : slots[r] < 0 ? -1 : slots[r] / c.top_k;
      for (int64_t n = 0; n < c.cols; ++n) {
        double sum = c.bias ? beta[e * c.cols + n] : 0;
        for (int64_t k = 0; k < c.depth && row >= 0; ++k) {
          sum += x[row * c.depth + k] *
                 w[e * c.depth * c.cols + k * product.b.row_stride + n * product.b.col_stride];
        }
        const double error = std::abs(actual[r * c.cols + n] - sum);
        if (!(error <= worst)) worst = error;
      }
    }
  }
  CHECK_CLOSE(worst, 0.0, 2e-2);
}

}  // namespace

TEST(stores) {
  check_store({});
  check_store({.along_depth = false});
  check_store({.dtype = DType::kFloat16, .gathered = false, .bias = false});
}
