// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "cuda/on_device.h"
#include "expert_mlp/bias_cuda.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using fomoe::DType;
using Values = std::vector<double>;

/// A routing of tokens to experts with the given numbers of rows; the slots in a random order, of
/// which the last ones are skipped.
struct Table {
  Table(const std::vector<int32_t>& rows_per_expert, int64_t num_tokens, int64_t top_k)
      : slot_to_row(num_tokens * top_k, -1),
        row_to_slot(num_tokens * top_k, -1),
        offsets(rows_per_expert.size() + 1) {
    std::partial_sum(rows_per_expert.begin(), rows_per_expert.end(), offsets.begin() + 1);
    std::vector<int32_t> slots(slot_to_row.size());
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), std::mt19937(5));
    for (int32_t row = 0; row < offsets.back(); ++row) {
      row_to_slot[row] = slots[row];
      slot_to_row[slots[row]] = row;
    }
    view = {slot_to_row.data(),
            row_to_slot.data(),
            offsets.data(),
            num_tokens,
            top_k,
            static_cast<int64_t>(rows_per_expert.size())};
  }

  std::vector<int32_t> slot_to_row, row_to_slot, offsets;
  fomoe::Routing view;
};

struct Case {
  DType dtype;
  int64_t width, misalignment = 0;
};

/// The sums over rows of a source that has one row per row of the product, or, `gathered`, one per
/// token, scaled by weights.
samples::Array expert_sums(const Case& c, const Table& table, bool gathered, const Values& values,
                           const Values& weights) {
  const int64_t num_rows = table.view.num_rows(), num_experts = table.view.num_local_experts;
  const on_device::Routing routing(table.view);
  const on_device::Vector<char> tiles_memory(fomoe::cuda::row_tiles_bytes(num_rows, num_experts));
  const on_device::Vector<char> workspace(
      fomoe::cuda::expert_sums_bytes(c.dtype, c.width, num_rows, num_experts));
  const on_device::Array source(c.dtype, values, c.misalignment);
  const on_device::Array scales(samples::accumulate_dtype(c.dtype), weights);
  const on_device::Array out(c.dtype, num_experts * c.width);
  const fomoe::cuda::RowTiles tiles = fomoe::cuda::list_row_tiles(
      routing.view.offsets, num_experts, num_rows, tiles_memory.data(), nullptr);
  fomoe::cuda::ExpertSums sums = {};
  sums.dtype = c.dtype;
  sums.source = {source.data(), num_rows, nullptr, 0};
  if (gathered) {
    sums.source = {source.data(), table.view.num_tokens, routing.view.row_to_slot,
                   table.view.top_k};
    sums.weights = scales.data();
  }
  sums.width = c.width;
  sums.num_rows = num_rows;
  sums.num_experts = num_experts;
  sums.tiles = tiles;
  sums.out = out.data();
  fomoe::cuda::sum_expert_rows(sums, workspace.data(), nullptr);
  return out.host();
}

void check_expert_sums(const Case& c, const Table& table) {
  const int64_t num_rows = table.view.num_rows();
  const Values weights =
      samples::Array(samples::accumulate_dtype(c.dtype), harness::random_values(num_rows, 2))
          .values();
  for (const bool gathered : {false, true}) {
    Values values =
        harness::random_values((gathered ? table.view.num_tokens : num_rows) * c.width, 1);
    if (!gathered) {  // what lies past the last executed row does not matter
      std::fill(values.begin() + table.offsets.back() * c.width, values.end(), NAN);
    }
    const Values rounded = samples::Array(c.dtype, values).values();
    Values expected(table.view.num_local_experts * c.width);
    for (int64_t e = 0; e < table.view.num_local_experts; ++e) {
      for (int64_t row = table.offsets[e]; row < table.offsets[e + 1]; ++row) {
        const int32_t slot = table.row_to_slot[row];
        const int64_t from = gathered ? slot / table.view.top_k : row;
        for (int64_t i = 0; i < c.width; ++i) {
          expected[e * c.width + i] +=
              (gathered ? weights[slot] : 1.0) * rounded[from * c.width + i];
        }
      }
    }
    const samples::Array actual = expert_sums(c, table, gathered, values, weights);
    CHECK_ALL_CLOSE(actual.values(), expected, samples::tolerance(c.dtype));
  }
}

samples::Array weight_gradient(const Case& c, const Table& table, int64_t num_parts,
                               const Values& parts, const Values& grad_y, const Values& b2) {
  const DType accumulate = samples::accumulate_dtype(c.dtype);
  const on_device::Routing routing(table.view);
  const on_device::Array device_parts(accumulate, parts);
  const on_device::Array device_grad_y(c.dtype, grad_y, c.misalignment);
  const on_device::Array device_b2(c.dtype, b2, c.misalignment);
  const on_device::Array d_weights(accumulate, table.view.num_rows());
  fomoe::cuda::finish_weight_gradient(
      {c.dtype, device_parts.data(), num_parts, device_grad_y.data(),
       b2.empty() ? nullptr : device_b2.data(), c.width, routing.view, d_weights.data()},
      nullptr);
  return d_weights.host();
}

void check_weight_gradient(const Case& c, const Table& table, int64_t num_parts) {
  const DType accumulate = samples::accumulate_dtype(c.dtype);
  const int64_t num_rows = table.view.num_rows(), num_experts = table.view.num_local_experts;
  Values parts = harness::random_values(num_rows * num_parts, 1);
  std::fill(parts.begin() + table.offsets.back() * num_parts, parts.end(), NAN);
  parts = samples::Array(accumulate, parts).values();
  const Values grad_y =
      samples::Array(c.dtype, harness::random_values(table.view.num_tokens * c.width, 2)).values();
  for (const bool has_bias : {false, true}) {
    const Values b2 =
        has_bias
            ? samples::Array(c.dtype, harness::random_values(num_experts * c.width, 3)).values()
            : Values();
    Values expected(num_rows);
    for (int64_t e = 0; e < num_experts; ++e) {
      for (int64_t row = table.offsets[e]; row < table.offsets[e + 1]; ++row) {
        const int32_t slot = table.row_to_slot[row];
        for (int64_t i = 0; i < num_parts; ++i) expected[slot] += parts[row * num_parts + i];
        for (int64_t i = 0; i < c.width && has_bias; ++i) {
          expected[slot] += grad_y[slot / table.view.top_k * c.width + i] * b2[e * c.width + i];
        }
      }
    }
    const samples::Array actual = weight_gradient(c, table, num_parts, parts, grad_y, b2);
    CHECK_ALL_CLOSE(actual.values(), expected, samples::tolerance(accumulate));
    for (int64_t slot = 0; slot < num_rows; ++slot) {
      if (table.slot_to_row[slot] < 0) CHECK(actual.values()[slot] == 0.0);
    }
  }
}

}  // namespace

TEST(adds_up_the_rows_of_each_expert) {
  const Table table({2, 0, 1}, 2, 2);
  const Case c = {DType::kFloat32, 2};
  const Values rows = {1, 2, 10, 20, 5, 6, NAN, NAN};
  CHECK_EQUAL(expert_sums(c, table, false, rows, Values(4)).values(), (Values{11, 22, 0, 0, 5, 6}));
}

TEST(sums_are_right_for_every_dtype_width_and_alignment) {
  const Table table({3, 0, 17}, 12, 2);
  for (const DType dtype : samples::kAllDTypes) {
    for (const auto& [width, misalignment] : {std::pair{1, 0}, {7, 1}, {264, 0}, {264, 1}}) {
      check_expert_sums({dtype, width, misalignment}, table);
      check_weight_gradient({dtype, width, misalignment}, table, 3);
    }
  }
}

TEST(an_expert_may_have_many_tiles_or_none) {
  check_expert_sums({DType::kBFloat16, 40}, Table({0, 129, 0, 1300, 128, 1}, 550, 3));
  check_weight_gradient({DType::kFloat32, 5}, Table({0, 129, 0, 128, 1}, 100, 3), 12);
}

TEST(gives_the_same_bits_every_time) {
  const Table table({200, 3}, 110, 2);
  const Case c = {DType::kBFloat16, 40};
  const Values values = harness::random_values(220 * c.width, 1);
  const auto sums = [&](bool gathered) {
    return expert_sums(c, table, gathered, values, harness::random_values(220, 2)).bytes();
  };
  CHECK(sums(false) == sums(false) && sums(true) == sums(true));
  const auto d_weights = [&] { return weight_gradient(c, table, 3, values, values, values); };
  CHECK(d_weights().bytes() == d_weights().bytes());
}

TEST(no_rows_give_zero) {
  check_expert_sums({DType::kFloat32, 5}, Table({0, 0}, 0, 2));
  check_expert_sums({DType::kBFloat16, 8}, Table({0, 0}, 3, 2));
  check_weight_gradient({DType::kBFloat16, 8}, Table({0, 0}, 3, 2), 2);
  check_weight_gradient({DType::kBFloat16, 8}, Table({0, 0}, 0, 2), 2);
}

#ifdef FOMOE_EMULATION

TEST(reads_every_row_once) {
  const Table table({3, 200, 0, 40}, 300, 1);
  const Case c = {DType::kBFloat16, 272};
  const Values values = harness::random_values(300 * c.width, 1);
  const auto counters = fomoe::emulation::count(
      [&] { expert_sums(c, table, true, values, harness::random_values(300, 2)); });
  const auto& counts = counters.at("sum_tile_rows");
  // Slots and weights of the executed rows, the list of the tiles and their number.
  const int64_t tables = 243 * 8 + 4 * 16 + 4;
  CHECK_EQUAL(counts.loads().distinct_bytes, 243 * c.width * 2 + tables);
  CHECK_EQUAL(counts.stores().bytes, 4 * c.width * 4);
  CHECK_EQUAL(counts.shared_loads.conflicts + counts.shared_stores.conflicts, 0);
}

#endif
