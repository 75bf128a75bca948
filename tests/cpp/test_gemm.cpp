// SPDX-License-Identifier: Apache-2.0
// cpu::multiply against three loops, whichever way it takes; the library is the three loops too.
#include "fomoe/gemm.h"

#include <array>

#include "samples.h"

using fomoe::DType;
using fomoe::Matrix;
using samples::Array;

namespace {

const fomoe::Gemm kLibrary = fomoe::reference::gemm();

/// rows x cols in memory of its own, by rows or by columns.
struct Operand {
  Operand(DType dtype, int64_t rows, int64_t cols, bool by_rows, uint32_t seed)
      : array(dtype, harness::random_values(rows * cols, seed)),
        view(by_rows ? Matrix{array.data(), rows, cols, cols, 1}
                     : Matrix{array.data(), rows, cols, 1, rows}) {}
  Array array;
  Matrix view;
};

constexpr int64_t kMargin = 67;  // elements, more than a vector
constexpr std::array<int64_t, 3> kSizes[] = {{3, 21, 35}, {9, 3, 35}, {13, 37, 33}, {27, 70, 65}};

/// rows x cols amid a larger matrix of NaN, with an odd stride.
struct Window {
  Window(DType dtype, int64_t rows, int64_t cols, bool by_rows, uint32_t seed)
      : array(dtype, amid_nan(by_rows ? rows : cols, by_rows ? cols : rows, seed)) {
    const int64_t stride = stride_of(by_rows ? cols : rows);
    const void* first = static_cast<const char*>(array.data()) +
                        (kMargin + stride * kLinesBefore) * fomoe::size_of(dtype);
    view = by_rows ? Matrix{first, rows, cols, stride, 1} : Matrix{first, rows, cols, 1, stride};
  }

  static constexpr int64_t kLinesBefore = 2;
  static int64_t stride_of(int64_t width) { return (2 * kMargin + width) | 1; }

  static std::vector<double> amid_nan(int64_t lines, int64_t width, uint32_t seed) {
    const int64_t stride = stride_of(width);
    const std::vector<double> inside = harness::random_values(lines * width, seed);
    std::vector<double> values((lines + 2 * kLinesBefore) * stride, NAN);
    for (int64_t i = 0; i < lines * width; ++i) {
      values[(kLinesBefore + i / width) * stride + kMargin + i % width] = inside[i];
    }
    return values;
  }

  Array array;
  Matrix view;
};

/// With a scratch of exactly the size, full of NaN.
void multiply(const fomoe::Gemm& library, DType dtype, const Matrix& a, const Matrix& b,
              const void* bias, const fomoe::DenseMatrix& c) {
  std::vector<char> scratch(fomoe::cpu::kGemmScratchBytes, '\xff');
  fomoe::cpu::multiply(library, dtype, a, b, bias, c, scratch.data());
}

void check_product(DType dtype, int64_t rows, int64_t inner, int64_t cols) {
  for (int layout = 0; layout < 8; ++layout) {
    const Operand a(dtype, rows, inner, layout & 1, 1), b(dtype, inner, cols, layout & 2, 2);
    const Array bias(dtype, harness::random_values(cols, 3));
    const void* addend = layout & 4 ? bias.data() : nullptr;
    Array expected(dtype, rows * cols), actual(dtype, rows * cols);
    kLibrary(dtype, a.view, b.view, addend, {expected.data(), rows, cols});
    multiply(kLibrary, dtype, a.view, b.view, addend, {actual.data(), rows, cols});
    CHECK_ALL_CLOSE(actual.values(), expected.values(), 2 * samples::tolerance(dtype));
  }
}

void refuse(void*, DType, const Matrix&, const Matrix&, const void*, const fomoe::DenseMatrix&) {
  harness::fail(__FILE__, __LINE__, "the library was called");
}

}  // namespace

TEST(a_bias_is_added_before_the_only_rounding) {
  // In bfloat16 256 + 1 is 256; 256 + 1 + 1 is 258.
  const DType bf16 = DType::kBFloat16;
  const Array a(bf16, std::vector<double>{256, 1}), b(bf16, std::vector<double>{1, 1}),
      bias(bf16, std::vector<double>{1});
  Array c(bf16, 1);
  multiply(kLibrary, bf16, {a.data(), 1, 2, 2, 1}, {b.data(), 2, 1, 1, 1}, bias.data(),
           {c.data(), 1, 1});
  CHECK_EQUAL(c.values()[0], 258.0);
}

TEST(every_layout_dtype_and_size_equals_three_loops) {
  for (DType dtype : samples::kAllDTypes) {
    for (int64_t rows : {1, 3, 4, 5, 9, 33}) {
      for (int64_t inner : {1, 2, 4, 5, 70}) {
        for (int64_t cols : {1, 7, 16, 300}) check_product(dtype, rows, inner, cols);
      }
    }
  }
}

TEST(blocks_and_panels_join_at_their_borders) {
  // More rows than a block, more columns than a panel, more terms than a step, and one of each
  // left.
  check_product(DType::kBFloat16, 385, 34, 33);
  check_product(DType::kBFloat16, 25, 1027, 65);
  check_product(DType::kBFloat16, 230, 2310, 31);
  check_product(DType::kBFloat16, 7, 20001, 3);
}

TEST(a_window_of_a_larger_matrix_is_a_matrix) {
  // Rows and columns around the windows are NaN, and what lies around the result must stay.
  for (DType dtype : samples::kAllDTypes) {
    for (const auto& [rows, inner, cols] : kSizes) {
      for (int layout = 0; layout < 4; ++layout) {
        const Window a(dtype, rows, inner, layout & 1, 1), b(dtype, inner, cols, layout & 2, 2);
        const Array bias(dtype, harness::random_values(cols, 3));
        Array expected(dtype, rows * cols), larger(dtype, rows * cols + 2 * kMargin);
        kLibrary(dtype, a.view, b.view, bias.data(), {expected.data(), rows, cols});
        char* c = static_cast<char*>(larger.data()) + kMargin * fomoe::size_of(dtype);
        multiply(kLibrary, dtype, a.view, b.view, bias.data(), {c, rows, cols});
        std::vector<double> actual = larger.values();
        for (int64_t i = 0; i < kMargin; ++i) {
          CHECK(std::isnan(actual[i]) && std::isnan(actual[actual.size() - 1 - i]));
        }
        actual = {actual.begin() + kMargin, actual.end() - kMargin};
        CHECK_ALL_CLOSE(actual, expected.values(), 2 * samples::tolerance(dtype));
      }
    }
  }
}

TEST(few_rows_need_no_library) {
  const fomoe::Gemm none = {&refuse, nullptr};
  for (DType dtype : samples::kAllDTypes) {
    for (bool b_by_rows : {false, true}) {
      const Operand a(dtype, 2, 9, true, 1), b(dtype, 9, 5, b_by_rows, 2);
      Array c(dtype, 10);
      multiply(none, dtype, a.view, b.view, nullptr, {c.data(), 2, 5});
    }
  }
}
