// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "fomoe/permute.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using fomoe::DType;

/// The kernel gives what the CPU op gives, to the bit.
void check_equals_cpu(DType dtype, int64_t num_tokens, int64_t top_k, int64_t width,
                      int64_t misalignment) {
  const samples::OwnedRouting routing = samples::random_routing(num_tokens, top_k, 7);
  const std::vector<double> values = harness::random_values(num_tokens * width, 1);
  const samples::Array x(dtype, values);
  samples::Array expected(dtype, num_tokens * top_k * width);
  fomoe::cpu::permute(dtype, x.data(), routing.view, width, expected.data());

  const on_device::Routing on_gpu(routing.view);
  const on_device::Array device_x(dtype, values, misalignment);
  on_device::Array rows(dtype, num_tokens * top_k * width, misalignment);
  fomoe::cuda::permute(dtype, device_x.data(), on_gpu.view, width, rows.data(), nullptr);
  CHECK(rows.host().bytes() == expected.bytes());
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

TEST(accepts_no_tokens_and_no_columns) {
  check_equals_cpu(DType::kBFloat16, 0, 2, 8, 0);
  check_equals_cpu(DType::kBFloat16, 3, 2, 0, 0);
}

#ifdef FOMOE_EMULATION

// b (T D + R D) bytes of rows, besides the tables.
TEST(reads_each_token_once_and_writes_each_row_once) {
  const int64_t num_tokens = 6, top_k = 3, width = 200, num_rows = num_tokens * top_k;
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
  CHECK_EQUAL(counts.loads().distinct_bytes, read.bytes + 4 * num_rows + 4);  // slots, one offset
  const auto written = counts.stores(rows.data(), num_rows * width * 2);
  CHECK_EQUAL(written.bytes, num_rows * width * 2);
  CHECK_EQUAL(written.distinct_bytes, written.bytes);
  CHECK_EQUAL(counts.stores().bytes, written.bytes);
}

#endif
