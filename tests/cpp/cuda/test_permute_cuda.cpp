// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "fomoe/permute.h"

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
