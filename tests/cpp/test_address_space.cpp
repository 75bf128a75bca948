// SPDX-License-Identifier: Apache-2.0
// Rows beyond 2^31 elements, where 32-bit indices wrap (TE#2908), and operands that end where the
// address space does.
#include <sys/mman.h>

#include <cstring>

#include "fomoe/combine.h"
#include "fomoe/expert_mlp.h"
#include "fomoe/grouped_gemm.h"
#include "fomoe/permute.h"
#include "fomoe/rows.h"
#include "samples.h"

using fomoe::DType;

namespace {

constexpr int32_t kLast = 400000;  // rows of width 7168 are 2.9e9 elements
constexpr int64_t kWidth = 7168;
constexpr int64_t kAllBytes = kLast * kWidth * 4;
const fomoe::Gemm kGemm = fomoe::reference::gemm();

/// Zeros, of which only the pages that are touched take memory. So the kernels can be shown the
/// last two of many rows, of which the others are neither read nor written.
class AddressSpace {
 public:
  explicit AddressSpace(int64_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    CHECK(data_ != MAP_FAILED);
  }
  AddressSpace(const AddressSpace&) = delete;
  ~AddressSpace() { munmap(data_, bytes_); }

  void* data() { return data_; }
  float* row(int64_t row, int64_t width = kWidth) {
    return static_cast<float*>(data_) + row * width;
  }

 private:
  int64_t bytes_;
  void* data_;
};

std::vector<float> values_of(const float* data, int64_t count) { return {data, data + count}; }

void fill(float* data, int64_t count, uint32_t seed) {
  for (double value : harness::random_values(count, seed)) *data++ = static_cast<float>(value);
}

}  // namespace

TEST(permute_reads_a_far_token) {
  AddressSpace x(kAllBytes);
  fill(x.row(kLast - 2), 2 * kWidth, 1);
  const std::vector<int32_t> row_to_slot = {kLast - 1, kLast - 2};
  const fomoe::Routing routing = {nullptr, row_to_slot.data(), nullptr, 2, 1, 1};
  std::vector<float> rows(2 * kWidth, NAN);
  fomoe::cpu::permute(DType::kFloat32, x.data(), routing, kWidth, rows.data());
  CHECK(values_of(rows.data(), kWidth) == values_of(x.row(kLast - 1), kWidth));
  CHECK(values_of(rows.data() + kWidth, kWidth) == values_of(x.row(kLast - 2), kWidth));
}

TEST(combine_reads_a_far_row_and_its_backward_a_far_token) {
  AddressSpace far(kAllBytes), d_weights(kLast * 4);
  fill(far.row(kLast - 1), kWidth, 1);
  const int32_t last = kLast - 1;
  const std::vector<float> one(kLast, 1.0f), near = values_of(far.row(last), kWidth);
  const fomoe::Routing from_row = {&last, nullptr, nullptr, 1, 1, 1};
  std::vector<float> y(kWidth, NAN), d_rows(kWidth, NAN);
  fomoe::cpu::combine(DType::kFloat32, far.data(), one.data(), from_row, kWidth, y.data());
  CHECK(y == near);

  const fomoe::Routing from_slot = {nullptr, &last, nullptr, 1, 1, 1};
  fomoe::cpu::combine_backward(DType::kFloat32, far.data(), near.data(), one.data(), from_slot,
                               kWidth, d_rows.data(), d_weights.data());
  CHECK(d_rows == near);
  float square = 0;
  for (float value : near) square += value * value;
  CHECK_CLOSE(d_weights.row(last, 1)[0], square, 1e-4 * square);
}

TEST(grouped_gemm_reads_and_writes_far_rows_and_a_far_expert) {
  const int64_t num_experts = 201, few = 3, expert_stride = 7168 * 4096;
  AddressSpace rows(kAllBytes), out(kAllBytes), weight(num_experts * expert_stride * 4);
  fill(weight.row(num_experts - 1, expert_stride), kWidth * few, 2);
  std::vector<int32_t> offsets(num_experts + 1, kLast - 2);
  offsets.back() = kLast;
  std::vector<char> scratch(fomoe::cpu::kGemmScratchBytes);
  for (const auto& [inner, cols] : {std::pair{kWidth, few}, std::pair{few, kWidth}}) {
    fill(rows.row(kLast - 2, inner), 2 * inner, 1);
    const fomoe::ExpertMatrices b = {
        DType::kFloat32, weight.data(), num_experts, inner, cols, expert_stride, cols, 1};
    fomoe::cpu::grouped_gemm(rows.data(), kLast, b, offsets.data(), kGemm, out.data(),
                             scratch.data());
    std::vector<float> expected(2 * cols, NAN);
    const fomoe::Matrix far = {weight.row(num_experts - 1, expert_stride), inner, cols, cols, 1};
    kGemm(DType::kFloat32, {rows.row(kLast - 2, inner), 2, inner, inner, 1}, far, nullptr,
          {expected.data(), 2, cols});
    for (int64_t i = 0; i < 2 * cols; ++i) {
      CHECK_CLOSE(out.row(kLast - 2, cols)[i], expected[i], 1e-3);
    }
    std::memset(rows.row(kLast - 2, inner), 0, 2 * inner * 4);
  }
}

TEST(expert_mlp_keeps_and_reads_far_rows) {
  // D = 3, F = 2^12: the pre-activation of 400000 rows has 3.3e9 elements.
  const int64_t dim = 3, expert_dim = 1 << 12, pre_dim = 2 * expert_dim;
  const std::vector<int32_t> far = {kLast - 2, kLast - 1}, near = {0, 1};
  const std::vector<int32_t> far_offsets = {kLast - 2, kLast}, near_offsets = {0, 2};
  std::vector<float> x(2 * dim), grad_y(2 * dim), w1(pre_dim * dim), w2(dim * expert_dim);
  std::vector<float> weights = {2, 3};
  fill(x.data(), 2 * dim, 1), fill(grad_y.data(), 2 * dim, 2);
  fill(w1.data(), pre_dim * dim, 3), fill(w2.data(), dim * expert_dim, 4);

  const auto run = [&](const std::vector<int32_t>& slot_to_row, const std::vector<int32_t>& offsets,
                       float* pre) {
    // Row r holds slot r minus the first row, so that the index behind it does not grow.
    const int32_t first = offsets[0];
    AddressSpace row_to_slot((first + 2) * 4);
    static_cast<int32_t*>(row_to_slot.data())[first + 1] = 1;
    const fomoe::ExpertMlp mlp = {
        fomoe::Activation::kSwiglu,
        {DType::kFloat32, w1.data(), 1, pre_dim, dim, pre_dim * dim, dim, 1},
        {DType::kFloat32, w2.data(), 1, dim, expert_dim, dim * expert_dim, expert_dim, 1},
        nullptr,
        nullptr,
        {slot_to_row.data(), static_cast<const int32_t*>(row_to_slot.data()), offsets.data(), 2, 1,
         1}};
    AddressSpace workspace(fomoe::cpu::expert_mlp_workspace_bytes(mlp) +
                           fomoe::cpu::expert_mlp_backward_workspace_bytes(mlp));
    std::vector<float> y(2 * dim, NAN), d_x(2 * dim, NAN), d_weights(2, NAN);
    std::vector<float> d_w1(w1.size(), NAN), d_w2(w2.size(), NAN);
    fomoe::cpu::expert_mlp(mlp, x.data(), weights.data(), kGemm, y.data(), pre, workspace.data());
    fomoe::cpu::expert_mlp_backward(
        mlp, grad_y.data(), x.data(), weights.data(), pre, kGemm,
        {d_x.data(), d_weights.data(), d_w1.data(), d_w2.data(), nullptr, nullptr},
        workspace.data());
    return std::vector{y, d_x, d_weights, d_w1, d_w2};
  };
  AddressSpace pre(kLast * pre_dim * 4), near_pre(2 * pre_dim * 4);
  const auto expected = run(near, near_offsets, near_pre.row(0));
  CHECK(run(far, far_offsets, pre.row(0)) == expected);
  CHECK(values_of(pre.row(kLast - 2, pre_dim), 2 * pre_dim) ==
        values_of(near_pre.row(0), 2 * pre_dim));
}

TEST(a_product_reads_nothing_behind_its_operands) {
  // Behind the operands lies a page that cannot be read. The sanitizer does not see what vector
  // instructions of our own read.
  constexpr int64_t kPage = 65536;  // a multiple of every system's
  const DType bf16 = DType::kBFloat16;
  AddressSpace a_pages(2 * kPage), b_pages(2 * kPage), bias_pages(2 * kPage);
  const auto last = [](AddressSpace& pages, int64_t count, uint32_t seed) {
    char* end = static_cast<char*>(pages.data()) + kPage;
    CHECK(mprotect(end, kPage, PROT_NONE) == 0);
    const samples::Array values(bf16, harness::random_values(count, seed));
    return std::memcpy(end - 2 * count, values.data(), 2 * count);
  };
  std::vector<char> scratch(fomoe::cpu::kGemmScratchBytes);
  for (int64_t rows : {5, 24, 37}) {
    for (int64_t inner : {5, 32, 51}) {
      for (int64_t cols : {5, 16, 49, 64}) {
        for (int layout = 0; layout < 4; ++layout) {
          const void* a = last(a_pages, rows * inner, 1);
          const void* b = last(b_pages, inner * cols, 2);
          const void* bias = last(bias_pages, cols, 3);
          const fomoe::Matrix left = layout & 1 ? fomoe::Matrix{a, rows, inner, inner, 1}
                                                : fomoe::Matrix{a, rows, inner, 1, rows};
          const fomoe::Matrix right = layout & 2 ? fomoe::Matrix{b, inner, cols, cols, 1}
                                                 : fomoe::Matrix{b, inner, cols, 1, inner};
          samples::Array expected(bf16, rows * cols), actual(bf16, rows * cols);
          kGemm(bf16, left, right, bias, {expected.data(), rows, cols});
          fomoe::cpu::multiply(kGemm, bf16, left, right, bias, {actual.data(), rows, cols},
                               scratch.data());
          CHECK_ALL_CLOSE(actual.values(), expected.values(), 2 * samples::tolerance(bf16));
        }
      }
    }
  }
}
