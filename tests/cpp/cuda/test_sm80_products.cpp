// SPDX-License-Identifier: Apache-2.0
#include "cuda/product_cases.h"
#ifdef FOMOE_EMULATION
#include "cuda_emulation.h"

#include "cuda/quotient.cuh"
#endif

namespace {

using namespace product_cases;
using fomoe::cuda::RowTile;

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

const Family kSm80 = {
    fomoe::cuda::sm80::num_weight_parts,
    [](const RowProduct& product) { fomoe::cuda::sm80::multiply(product, nullptr); },
    [](const WeightProduct& product) { fomoe::cuda::sm80::multiply(product, nullptr); }};

}  // namespace

TEST(rows_meet_the_matrices_of_their_experts) {
  for (const DType dtype : kDTypes) check_all(kSm80, dtype, aligned_row_cases());
}

TEST(the_rows_of_each_expert_meet_each_other) {
  for (const DType dtype : kDTypes) check_all(kSm80, dtype, aligned_weight_cases());
}

// Bands of 16 tiles of rows; the last has fewer.
TEST(every_tile_is_taken_once_in_whatever_order) {
  const Rows rows = {std::vector<int32_t>(19, 1)};
  check(kSm80, DType::kBFloat16, {.rows = rows, .depth = 8, .cols = 264, .is_transposed = true});
}

TEST(the_parts_of_a_combine_weight_are_tiles_of_128_columns) {
  CHECK_EQUAL(fomoe::cuda::sm80::num_weight_parts(128), 1);
  CHECK_EQUAL(fomoe::cuda::sm80::num_weight_parts(136), 2);
}

#ifdef FOMOE_EMULATION

namespace {

using fomoe::emulation::KernelCounts;

/// 130 + 70 rows of two experts, and one tile of columns.
struct CountedProduct {
  static constexpr int64_t kRows = 200, kRowTiles = 3, kDepth = 72, kCols = 128;

  explicit CountedProduct(bool is_transposed) {
    product.source = {source.data(), kRows, nullptr, 0};
    product.b = {DType::kBFloat16, b.data(), 2, kDepth, kCols, kDepth * kCols, kCols, 1};
    if (is_transposed) {
      product.b.row_stride = 1;
      product.b.col_stride = kDepth;
    }
    product.num_rows = kRows;
    product.tiles = {tiles.data(), count.data(), kRowTiles};
    product.out = out.data();
  }

  on_device::Array source{DType::kBFloat16, harness::random_values(kRows * kDepth, 1)};
  on_device::Array b{DType::kBFloat16, harness::random_values(2 * kDepth * kCols, 2)};
  on_device::Array out{DType::kBFloat16, kRows * kCols};
  on_device::Vector<RowTile> tiles{
      std::vector<RowTile>{{0, 0, 128, 0}, {0, 128, 130, 0}, {1, 130, 200, 0}}};
  on_device::Vector<int32_t> count{std::vector<int32_t>{kRowTiles}};
  RowProduct product = {};
};

void check_no_bank_conflicts(const KernelCounts& counts) {
  CHECK(counts.shared_loads.requests > 0);
  CHECK_EQUAL(counts.shared_loads.conflicts, 0);
  CHECK_EQUAL(counts.shared_stores.conflicts, 0);
}

}  // namespace

TEST(a_quotient_is_that_of_the_division) {
  for (const int64_t divisor : {1, 2, 3, 5, 6, 7, 8, 127, 128, 129, 641, 4095, 4096}) {
    const fomoe::cuda::Quotient quotient = fomoe::cuda::divided_by(divisor);
    const int64_t last = (int64_t{1} << 31) - 1;
    for (const int64_t multiple : {int64_t{0}, divisor, 1000 * divisor, last / divisor * divisor}) {
      for (int64_t number = multiple - 1; number <= multiple + 1; ++number) {
        if (number < 0 || number > last) continue;
        CHECK_EQUAL(quotient(static_cast<uint32_t>(number)), number / divisor);
      }
    }
  }
}

TEST(each_tile_reads_its_rows_and_its_columns_once_and_writes_16_bytes_at_a_time) {
  using P = CountedProduct;
  for (const bool is_transposed : {false, true}) {
    const CountedProduct problem(is_transposed);
    const auto counters = fomoe::emulation::count([&] { kSm80.multiply_rows(problem.product); });
    CHECK_EQUAL(counters.size(), 1u);
    const KernelCounts& counts = counters.at("sm80_row_store");
    const auto source = counts.loads(problem.source.data(), P::kRows * P::kDepth * 2);
    CHECK_EQUAL(source.bytes, P::kRows * P::kDepth * 2);
    CHECK_EQUAL(source.distinct_bytes, source.bytes);
    const auto b = counts.loads(problem.b.data(), 2 * P::kDepth * P::kCols * 2);
    CHECK_EQUAL(b.bytes, P::kRowTiles * P::kDepth * P::kCols * 2);
    const auto out = counts.stores(problem.out.data(), P::kRows * P::kCols * 2);
    CHECK_EQUAL(out.bytes, P::kRows * P::kCols * 2);
    CHECK_EQUAL(out.distinct_bytes, out.bytes);
    CHECK_EQUAL(out.sectors * 32, out.bytes);
    CHECK_EQUAL(counts.stores().bytes, out.bytes);
    check_no_bank_conflicts(counts);
  }
}

TEST(no_epilogue_and_no_sum_over_rows_has_bank_conflicts) {
  RowCase problem = {.rows = {{40}, 2}, .depth = 40, .cols = 128};
  WeightCase weights = {.rows = {{40}, 2}, .gathers_left = true, .out_rows = 128, .out_cols = 136};
  const auto counters = fomoe::emulation::count([&] {
    for (const Epilogue epilogue : {Epilogue::kActivate, Epilogue::kActivateBackward}) {
      problem.epilogue = epilogue;
      check(kSm80, DType::kBFloat16, problem);
    }
    check(kSm80, DType::kBFloat16, weights);
  });
  CHECK_EQUAL(counters.size(), 3u);
  for (const auto& [kernel, counts] : counters) check_no_bank_conflicts(counts);
}

#endif
