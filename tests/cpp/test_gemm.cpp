// SPDX-License-Identifier: Apache-2.0
// cpu::multiply against three loops, whichever way it takes; the library is the three loops too.
#include "fomoe/gemm.h"

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

void check_product(DType dtype, int64_t rows, int64_t inner, int64_t cols) {
  for (int layout = 0; layout < 8; ++layout) {
    const Operand a(dtype, rows, inner, layout & 1, 1), b(dtype, inner, cols, layout & 2, 2);
    const Array bias(dtype, harness::random_values(cols, 3));
    const void* addend = layout & 4 ? bias.data() : nullptr;
    Array expected(dtype, rows * cols), actual(dtype, rows * cols);
    kLibrary(dtype, a.view, b.view, addend, {expected.data(), rows, cols});
    fomoe::cpu::multiply(kLibrary, dtype, a.view, b.view, addend, {actual.data(), rows, cols});
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
  fomoe::cpu::multiply(kLibrary, bf16, {a.data(), 1, 2, 2, 1}, {b.data(), 2, 1, 1, 1}, bias.data(),
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

TEST(few_rows_need_no_library) {
  const fomoe::Gemm none = {&refuse, nullptr};
  for (DType dtype : samples::kAllDTypes) {
    for (bool b_by_rows : {false, true}) {
      const Operand a(dtype, 2, 9, true, 1), b(dtype, 9, 5, b_by_rows, 2);
      Array c(dtype, 10);
      fomoe::cpu::multiply(none, dtype, a.view, b.view, nullptr, {c.data(), 2, 5});
    }
  }
}
