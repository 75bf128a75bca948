// SPDX-License-Identifier: Apache-2.0
#include <memory>

#include "cuda/product_cases.h"
#include "expert_mlp/decode_cuda.h"
#include "fomoe/expert_mlp.h"

#ifdef FOMOE_EMULATION
#include "counters.h"
#endif

namespace {

using namespace product_cases;
namespace decode = fomoe::cuda::decode;

/// The kernels want the offsets of the experts, which a RowProduct does not have.
Family with_offsets(const Rows& rows) {
  std::vector<int32_t> offsets = {0};
  for (const int32_t count : rows.per_expert) offsets.push_back(offsets.back() + count);
  const auto on_gpu = std::make_shared<on_device::Vector<int32_t>>(offsets);
  return {
      nullptr,
      [on_gpu](const RowProduct& product) { decode::multiply(product, on_gpu->data(), nullptr); },
      nullptr};
}

void check(DType dtype, RowCase problem) {
  problem.is_transposed = true;
  product_cases::check(with_offsets(problem.rows), dtype, problem);
}

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

}  // namespace

TEST(few_rows_meet_the_matrices_of_their_experts) {
  for (const DType dtype : kDTypes) {
    check(dtype, {.rows = {{1}}, .depth = 8, .cols = 8});
    check(dtype, {.rows = {{0, 3, 1, 0, 2}}, .depth = 264, .cols = 24, .padding = 8});
    check(dtype, {.rows = {{4, 9, 1}, 2}, .depth = 528, .cols = 40, .has_bias = true});
    check(dtype, {.rows = {{2, 5, 3}, 0, 1}, .depth = 24, .cols = 16});
    check(dtype, {.rows = {{2, 1}}, .depth = 0, .cols = 16, .has_bias = true});
    check(dtype, {.rows = {{2, 1}}, .depth = 8, .cols = 0});
    check(dtype, {.rows = {{0, 0}}, .depth = 8, .cols = 8});
  }
}

TEST(few_rows_are_activated) {
  for (const DType dtype : kDTypes) {
    for (const Activation activation :
         {Activation::kSwiglu, Activation::kSilu, Activation::kSwigluClamped}) {
      for (const std::vector<int32_t>& rows : std::vector<std::vector<int32_t>>{{1, 0, 2}, {7}}) {
        check(dtype, {.rows = {rows, 3},
                      .depth = 40,
                      .cols = 48,
                      .epilogue = Epilogue::kActivate,
                      .activation = activation,
                      .has_bias = true});
      }
    }
  }
}

TEST(fewer_rows_than_experts_are_found) {
  for (const DType dtype : kDTypes) {
    std::vector<int32_t> rows(70, 0);
    rows[0] = rows[33] = 1;
    rows[69] = 3;
    check(dtype, {.rows = {rows}, .depth = 16, .cols = 8});
    check(dtype, {.rows = {rows, 2}, .depth = 16, .cols = 8, .has_bias = true});
  }
}

TEST(many_rows_and_odd_layouts_take_other_kernels) {
  using fomoe::KernelPath;
  const fomoe::ExpertMatrices b = {DType::kBFloat16, nullptr, 128, 2048, 768, 2048 * 768, 1, 2048};
  CHECK(decode::is_faster(KernelPath::kSm90, b, 256));
  CHECK(!decode::is_faster(KernelPath::kSm90, b, 257));
  CHECK(!decode::is_faster(KernelPath::kSimple, b, 256));
  CHECK(!decode::is_faster(KernelPath::kSm90, b.transposed(), 256));
}

#ifdef FOMOE_EMULATION
TEST(the_matrices_of_experts_with_rows_are_read_once_and_no_others) {
  const int64_t depth = 528, cols = 48, experts = 6;
  const std::vector<int32_t> offsets = {0, 2, 2, 3, 7, 7, 7};
  const on_device::Vector<int32_t> device_offsets(offsets);
  const on_device::Array source(DType::kBFloat16, harness::random_values(12 * depth, 1));
  const on_device::Array weight(DType::kBFloat16,
                                harness::random_values(experts * cols * depth, 2));
  const on_device::Array hidden(DType::kBFloat16, 12 * cols / 2);
  RowProduct product = {};
  product.source = {source.data(), 12, nullptr, 0};
  product.b = {DType::kBFloat16, weight.data(), experts, depth, cols, depth * cols, 1, depth};
  product.num_rows = 12;
  product.epilogue = Epilogue::kActivate;
  product.hidden = hidden.data();
  const auto counters =
      fomoe::emulation::count([&] { decode::multiply(product, device_offsets.data(), nullptr); });
  const auto loads =
      counters.at("decode_activate").loads(weight.data(), experts * cols * depth * 2);
  CHECK_EQUAL(loads.bytes, 3 * cols * depth * 2);
  CHECK_EQUAL(loads.distinct_bytes, loads.bytes);
  CHECK_EQUAL(loads.sectors * 32, loads.bytes);
}
#endif
