// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "fomoe/permute.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using fomoe::DType;

samples::Array permuted(const fomoe::Routing& routing, DType dtype,
                        const std::vector<double>& values, int64_t width,
                        int64_t misalignment = 0) {
  const on_device::Routing on_gpu(routing);
  const on_device::Array x(dtype, values, misalignment);
  const on_device::Array rows(dtype, routing.num_rows() * width, misalignment);
  fomoe::cuda::permute(dtype, x.data(), on_gpu.view, width, rows.data(), nullptr);
  return rows.host();
}

/// The kernel gives what the CPU op gives, to the bit.
void check_equals_cpu(const fomoe::Routing& routing, DType dtype, int64_t width,
                      int64_t misalignment) {
  const std::vector<double> values = harness::random_values(routing.num_tokens * width, 1);
  const samples::Array x(dtype, values);
  samples::Array expected(dtype, routing.num_rows() * width);
  fomoe::cpu::permute(dtype, x.data(), routing, width, expected.data());
  CHECK(permuted(routing, dtype, values, width, misalignment).bytes() == expected.bytes());
}

void check_equals_cpu(DType dtype, int64_t num_tokens, int64_t top_k, int64_t width,
                      int64_t misalignment) {
  check_equals_cpu(samples::random_routing(num_tokens, top_k, 7).view, dtype, width, misalignment);
}

}  // namespace

TEST(gives_what_the_cpu_gives_for_every_dtype_and_alignment) {
  for (const DType dtype : samples::kAllDTypes) {
    for (const int64_t width : {1, 7, 8, 64, 1000}) {
      check_equals_cpu(dtype, 5, 3, width, 0);
      check_equals_cpu(dtype, 5, 3, width, 1);
    }
  }
}

TEST(takes_wide_rows_in_several_turns) {
  check_equals_cpu(DType::kBFloat16, 2, 3, 8 * 256 + 8, 0);
  check_equals_cpu(DType::kFloat32, 2, 9, 600, 1);
}

TEST(short_rows_share_a_block) {
  check_equals_cpu(DType::kBFloat16, 19, 3, 8, 0);
  check_equals_cpu(DType::kFloat32, 5, 40, 4 * 33, 0);
}

TEST(accepts_any_number_of_experts_per_token) {
  for (const int64_t top_k : {1, 2, 8, 9, 10, 31, 32, 33, 70}) {
    check_equals_cpu(DType::kBFloat16, 3, top_k, 24, 0);
  }
}

TEST(rows_are_zero_where_every_expert_is_a_ghost) {
  const samples::OwnedRouting ghosts({0, 1, 1, 0}, 2, {-1, -1}, 1);
  const samples::OwnedRouting none({-1, -1, -1, -1, -1, -1}, 3, {0}, 1);
  check_equals_cpu(ghosts.view, DType::kBFloat16, 72, 0);
  check_equals_cpu(none.view, DType::kFloat64, 7, 1);
}

TEST(one_expert_may_have_every_row) {
  const samples::OwnedRouting all({1, 1, 1, 1}, 1, {0, 1, 2}, 3);
  check_equals_cpu(all.view, DType::kFloat16, 72, 0);
}

TEST(gives_the_same_bits_every_time) {
  const samples::OwnedRouting routing = samples::random_routing(6, 5, 7);
  const std::vector<double> values = harness::random_values(6 * 40, 1);
  CHECK(permuted(routing.view, DType::kFloat32, values, 40).bytes() ==
        permuted(routing.view, DType::kFloat32, values, 40).bytes());
}

TEST(indices_outside_the_rows_count_as_skipped) {
  constexpr int32_t kLow = -2147483647 - 1, kHigh = 2147483647;
  const std::vector<int32_t> slot_to_row = {1, 6, kHigh, -2, kLow, 0}, row_to_slot(6);
  const std::vector<double> values = {1, 2, 3, 4};
  for (const auto& [end, expected] :
       {std::pair{2, std::vector<double>{3, 4, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0}},
        std::pair{kHigh, std::vector<double>{3, 4, 1, 2}},
        std::pair{kLow, std::vector<double>{}}}) {
    const std::vector<int32_t> offsets = {0, end};
    const fomoe::Routing routing = {
        slot_to_row.data(), row_to_slot.data(), offsets.data(), 2, 3, 1};
    std::vector<double> rows = permuted(routing, DType::kFloat32, values, 2).values();
    rows.resize(expected.size());  // the rest is whatever the wrong tables make of it
    CHECK_EQUAL(rows, expected);
  }
}

TEST(accepts_no_tokens_and_no_columns) {
  check_equals_cpu(DType::kBFloat16, 0, 2, 8, 0);
  check_equals_cpu(DType::kBFloat16, 3, 2, 0, 0);
}

#ifdef FOMOE_EMULATION

// b (T D + R D) bytes of rows, besides the tables.
TEST(reads_each_token_once_and_writes_each_row_once) {
  const int64_t num_tokens = 6, top_k = 3, width = 208, num_rows = num_tokens * top_k;
  const samples::OwnedRouting routing = samples::random_routing(num_tokens, top_k, 7);
  const on_device::Routing on_gpu(routing.view);
  const on_device::Array x(DType::kBFloat16, harness::random_values(num_tokens * width, 1));
  const on_device::Array rows(DType::kBFloat16, num_rows * width);
  const auto counters = fomoe::emulation::count([&] {
    fomoe::cuda::permute(DType::kBFloat16, x.data(), on_gpu.view, width, rows.data(), nullptr);
  });
  CHECK_EQUAL(counters.size(), 1u);
  const fomoe::emulation::KernelCounts& counts = counters.at("permute");

  const auto read = counts.loads(x.data(), num_tokens * width * 2);
  CHECK_EQUAL(read.bytes, num_tokens * width * 2);
  CHECK_EQUAL(read.distinct_bytes, read.bytes);
  CHECK_EQUAL(read.sectors * 32, read.bytes);
  CHECK_EQUAL(counts.loads().distinct_bytes, read.bytes + 4 * num_rows + 4);  // slots, one offset
  const auto written = counts.stores(rows.data(), num_rows * width * 2);
  CHECK_EQUAL(written.bytes, num_rows * width * 2);
  CHECK_EQUAL(written.distinct_bytes, written.bytes);
  CHECK_EQUAL(written.sectors * 32, written.bytes);
  CHECK_EQUAL(counts.stores().bytes, written.bytes);
}

#endif
