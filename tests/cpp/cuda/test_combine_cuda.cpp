// SPDX-License-Identifier: Apache-2.0
#include "cuda/on_device.h"
#include "fomoe/combine.h"
#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using fomoe::DType;

struct Case {
  DType dtype = DType::kBFloat16;
  int64_t num_tokens = 5, top_k = 3, width = 8, misalignment = 0;

  int64_t num_rows() const { return num_tokens * top_k; }
};

/// Of both ops, with NaN in the rows that no slot points to.
struct Inputs {
  explicit Inputs(const Case& c)
      : routing(samples::random_routing(c.num_tokens, c.top_k, 7)),
        rows(harness::random_values(c.num_rows() * c.width, 1)),
        weights(harness::random_values(c.num_rows(), 2)),
        grad_y(harness::random_values(c.num_tokens * c.width, 3)) {
    const auto executed = routing.view.num_executed_rows() * c.width;
    std::fill(rows.begin() + executed, rows.end(), NAN);
  }

  samples::OwnedRouting routing;
  std::vector<double> rows, weights, grad_y;
};

samples::Array combined(const Case& c, const Inputs& inputs, bool has_weights = true) {
  const on_device::Routing routing(inputs.routing.view);
  const on_device::Array rows(c.dtype, inputs.rows, c.misalignment);
  const on_device::Array weights(samples::accumulate_dtype(c.dtype), inputs.weights);
  const on_device::Array y(c.dtype, c.num_tokens * c.width, c.misalignment);
  fomoe::cuda::combine(c.dtype, rows.data(), has_weights ? weights.data() : nullptr, routing.view,
                       c.width, y.data(), nullptr);
  return y.host();
}

struct Gradient {
  samples::Array rows, weights;
};

Gradient gradient(const Case& c, const Inputs& inputs) {
  const DType accumulate = samples::accumulate_dtype(c.dtype);
  const on_device::Routing routing(inputs.routing.view);
  const on_device::Array grad_y(c.dtype, inputs.grad_y, c.misalignment);
  const on_device::Array rows(c.dtype, inputs.rows, c.misalignment);
  const on_device::Array weights(accumulate, inputs.weights);
  const on_device::Array d_rows(c.dtype, c.num_rows() * c.width, c.misalignment);
  const on_device::Array d_weights(accumulate, c.num_rows());
  fomoe::cuda::combine_backward(c.dtype, grad_y.data(), rows.data(), weights.data(), routing.view,
                                c.width, d_rows.data(), d_weights.data(), nullptr);
  return {d_rows.host(), d_weights.host()};
}

/// y and d_rows are those of the CPU to the bit, d_weights up to the order of its sum.
void check_equals_cpu(const Case& c) {
  const Inputs inputs(c);
  const DType accumulate = samples::accumulate_dtype(c.dtype);
  const samples::Array rows(c.dtype, inputs.rows), grad_y(c.dtype, inputs.grad_y);
  const samples::Array weights(accumulate, inputs.weights);
  for (const bool has_weights : {true, false}) {
    samples::Array expected(c.dtype, c.num_tokens * c.width);
    fomoe::cpu::combine(c.dtype, rows.data(), has_weights ? weights.data() : nullptr,
                        inputs.routing.view, c.width, expected.data());
    CHECK(combined(c, inputs, has_weights).bytes() == expected.bytes());
  }

  samples::Array d_rows(c.dtype, c.num_rows() * c.width), d_weights(accumulate, c.num_rows());
  fomoe::cpu::combine_backward(c.dtype, grad_y.data(), rows.data(), weights.data(),
                               inputs.routing.view, c.width, d_rows.data(), d_weights.data());
  const Gradient actual = gradient(c, inputs);
  CHECK(actual.rows.bytes() == d_rows.bytes());
  CHECK_ALL_CLOSE(actual.weights.values(), d_weights.values(), samples::tolerance(accumulate));
  for (int64_t slot = 0; slot < c.num_rows(); ++slot) {
    if (inputs.routing.view.slot_to_row[slot] < 0) CHECK(actual.weights.values()[slot] == 0.0);
  }
}

}  // namespace

TEST(sums_the_weighted_rows_of_each_token) {
  // Token 0 has rows 1 and 0, token 1 has row 2 and a skipped path.
  const std::vector<int32_t> slot_to_row = {1, 0, -1, 2}, row_to_slot = {1, 0, 3, -1};
  const std::vector<int32_t> offsets = {0, 3};
  const on_device::Routing routing(
      fomoe::Routing{slot_to_row.data(), row_to_slot.data(), offsets.data(), 2, 2, 1});
  const on_device::Array rows(DType::kFloat32, {1, 2, 3, 4, 5, 6, NAN, NAN});
  const on_device::Array weights(DType::kFloat32, {10, 100, NAN, -1});
  const on_device::Array y(DType::kFloat32, 4);
  fomoe::cuda::combine(DType::kFloat32, rows.data(), weights.data(), routing.view, 2, y.data(),
                       nullptr);
  CHECK_EQUAL(y.values(), (std::vector<double>{130, 240, -5, -6}));

  const on_device::Array grad_y(DType::kFloat32, {1, 2, 3, 4});
  const on_device::Array d_rows(DType::kFloat32, 8), d_weights(DType::kFloat32, 4);
  fomoe::cuda::combine_backward(DType::kFloat32, grad_y.data(), rows.data(), weights.data(),
                                routing.view, 2, d_rows.data(), d_weights.data(), nullptr);
  CHECK_EQUAL(d_rows.values(), (std::vector<double>{100, 200, 10, 20, -3, -4, 0, 0}));
  CHECK_EQUAL(d_weights.values(), (std::vector<double>{11, 5, 0, 39}));
}

TEST(gives_what_the_cpu_gives_for_every_dtype_width_and_alignment) {
  for (const DType dtype : samples::kAllDTypes) {
    for (const int64_t width : {1, 2, 7, 8, 72, 1000}) {
      for (const int64_t misalignment : {0, 1, 2}) {
        check_equals_cpu({dtype, 4, 3, width, misalignment});
      }
    }
  }
}

TEST(takes_wide_rows_in_several_turns) {
  check_equals_cpu({DType::kBFloat16, 2, 3, 8 * 256 + 8, 0});
  check_equals_cpu({DType::kFloat32, 2, 9, 600, 1});
}

TEST(short_rows_share_a_block) {
  check_equals_cpu({DType::kBFloat16, 19, 3, 8, 0});
  check_equals_cpu({DType::kFloat32, 5, 40, 4 * 33, 0});
}

TEST(accepts_any_number_of_experts_per_token) {
  for (const int64_t top_k : {1, 2, 8, 9, 10, 31, 32, 33, 70}) {
    check_equals_cpu({DType::kBFloat16, 3, top_k, 24, 0});
    check_equals_cpu({DType::kFloat64, 2, top_k, 5, 1});
  }
}

TEST(accepts_no_tokens_and_no_columns) {
  check_equals_cpu({DType::kBFloat16, 0, 2, 8, 0});
  check_equals_cpu({DType::kFloat64, 3, 2, 0, 0});
}

TEST(a_gradient_that_is_not_finite_leaves_skipped_weights_alone) {
  const Case c = {DType::kFloat32, 3, 2, 4, 0};
  Inputs inputs(c);
  inputs.grad_y.assign(inputs.grad_y.size(), NAN);
  const std::vector<double> d_weights = gradient(c, inputs).weights.values();
  for (int64_t slot = 0; slot < c.num_rows(); ++slot) {
    CHECK((inputs.routing.view.slot_to_row[slot] < 0) == (d_weights[slot] == 0.0));
  }
}

TEST(gives_the_same_bits_every_time) {
  const Case c = {DType::kBFloat16, 5, 10, 520, 0};
  const Inputs inputs(c);
  const Gradient first = gradient(c, inputs), second = gradient(c, inputs);
  CHECK(first.rows.bytes() == second.rows.bytes());
  CHECK(first.weights.bytes() == second.weights.bytes());
  CHECK(combined(c, inputs).bytes() == combined(c, inputs).bytes());
}

TEST(indices_outside_the_rows_count_as_skipped) {
  constexpr int32_t kLow = -2147483647 - 1, kHigh = 2147483647;
  const std::vector<int32_t> slot_to_row = {0, 4, kHigh, -2, kLow, 1}, row_to_slot(6);
  const std::vector<int32_t> corrected = {0, 4, -1, -1, -1, 1};
  std::vector<std::vector<double>> results;
  for (const std::vector<int32_t>& slots : {slot_to_row, corrected}) {
    for (const int32_t end : {2, kHigh, kLow}) {
      const std::vector<int32_t> offsets = {0, end};
      const on_device::Routing routing(
          fomoe::Routing{slots.data(), row_to_slot.data(), offsets.data(), 2, 3, 1});
      const on_device::Array rows(DType::kFloat32, harness::random_values(6 * 4, 1));
      const on_device::Array weights(DType::kFloat32, harness::random_values(6, 2));
      const on_device::Array y(DType::kFloat32, 8), d_rows(DType::kFloat32, 24);
      const on_device::Array d_weights(DType::kFloat32, 6);
      fomoe::cuda::combine(DType::kFloat32, rows.data(), weights.data(), routing.view, 4, y.data(),
                           nullptr);
      fomoe::cuda::combine_backward(DType::kFloat32, y.data(), rows.data(), weights.data(),
                                    routing.view, 4, d_rows.data(), d_weights.data(), nullptr);
      results.push_back(y.values());
      results.push_back(d_weights.values());
    }
  }
  for (size_t i = 2; i < results.size(); ++i) CHECK_EQUAL(results[i], results[i % 2]);
}

#ifdef FOMOE_EMULATION

namespace {

using fomoe::emulation::KernelCounts;
using fomoe::emulation::Traffic;

/// Every byte of the array once, in whole sectors.
void check_moved_once(const Traffic& traffic, int64_t bytes) {
  CHECK_EQUAL(traffic.bytes, bytes);
  CHECK_EQUAL(traffic.distinct_bytes, bytes);
  CHECK_EQUAL(traffic.sectors * 32, bytes);
}

constexpr Case kCounted = {DType::kBFloat16, 6, 3, 208, 0};
constexpr int64_t kRowBytes = kCounted.width * 2;

}  // namespace

// b D (executed rows + T) bytes, and 8 R of slots and weights; kernels' traffic is the least.
TEST(reads_each_executed_row_once_and_writes_each_token_once) {
  const Inputs inputs(kCounted);
  const int64_t executed = inputs.routing.view.num_executed_rows();
  const on_device::Routing routing(inputs.routing.view);
  const on_device::Array rows(kCounted.dtype, inputs.rows);
  const on_device::Array weights(DType::kFloat32, inputs.weights);
  const on_device::Array y(kCounted.dtype, kCounted.num_tokens * kCounted.width);
  const auto counters = fomoe::emulation::count([&] {
    fomoe::cuda::combine(kCounted.dtype, rows.data(), weights.data(), routing.view, kCounted.width,
                         y.data(), nullptr);
  });
  CHECK_EQUAL(counters.size(), 1u);
  const KernelCounts& counts = counters.at("combine");
  check_moved_once(counts.loads(rows.data(), kCounted.num_rows() * kRowBytes),
                   executed * kRowBytes);
  check_moved_once(counts.stores(), kCounted.num_tokens * kRowBytes);
  CHECK_EQUAL(counts.loads().distinct_bytes,
              executed * kRowBytes + 4 * kCounted.num_rows() + 4 * executed);
}

// b D (T + 2 R) bytes: the gradient and every executed row are read, every row is written.
TEST(the_backward_moves_every_row_once) {
  const Inputs inputs(kCounted);
  const int64_t executed = inputs.routing.view.num_executed_rows();
  const on_device::Routing routing(inputs.routing.view);
  const on_device::Array grad_y(kCounted.dtype, inputs.grad_y), rows(kCounted.dtype, inputs.rows);
  const on_device::Array weights(DType::kFloat32, inputs.weights);
  const on_device::Array d_rows(kCounted.dtype, kCounted.num_rows() * kCounted.width);
  const on_device::Array d_weights(DType::kFloat32, kCounted.num_rows());
  const auto counters = fomoe::emulation::count([&] {
    fomoe::cuda::combine_backward(kCounted.dtype, grad_y.data(), rows.data(), weights.data(),
                                  routing.view, kCounted.width, d_rows.data(), d_weights.data(),
                                  nullptr);
  });
  CHECK_EQUAL(counters.size(), 1u);
  const KernelCounts& counts = counters.at("combine_backward");
  const int64_t token_bytes = kCounted.num_tokens * kRowBytes;
  check_moved_once(counts.loads(grad_y.data(), token_bytes), token_bytes);
  check_moved_once(counts.loads(rows.data(), kCounted.num_rows() * kRowBytes),
                   executed * kRowBytes);
  check_moved_once(counts.stores(d_rows.data(), kCounted.num_rows() * kRowBytes),
                   kCounted.num_rows() * kRowBytes);
  CHECK_EQUAL(counts.loads().distinct_bytes,
              token_bytes + executed * kRowBytes + 4 * kCounted.num_rows() + 4 * executed + 4);
  CHECK_EQUAL(counts.stores().bytes, kCounted.num_rows() * (kRowBytes + 4));
  CHECK_EQUAL(counts.shared_loads.conflicts + counts.shared_stores.conflicts, 0);
}

#endif
