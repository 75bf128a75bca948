// SPDX-License-Identifier: Apache-2.0
// Problems for the matrix products of kernels/grouped_gemm/products.h, and their answers by plain
// loops in double. Every family of kernels is tested with the same ones.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda/on_device.h"
#include "expert_mlp/activated.h"
#include "grouped_gemm/products.h"

namespace product_cases {

using fomoe::Activation;
using fomoe::DType;
using fomoe::cuda::Epilogue;
using fomoe::cuda::RowProduct;
using fomoe::cuda::WeightProduct;

struct Family {
  std::function<int64_t(int64_t)> num_weight_parts;
  std::function<void(const RowProduct&)> multiply_rows;
  std::function<void(const WeightProduct&)> multiply_weights;
};

/// Which rows exist and where they come from. Rows past the last executed one, tokens without an
/// executed row and the matrices of experts without rows hold NaN.
struct Rows {
  std::vector<int32_t> per_expert;
  int64_t top_k = 0;        // 0: row r is row r of the source; else gathered from tokens
  int64_t nan_expert = -1;  // its rows hold NaN too, if they are not gathered
};

struct RowCase {
  Rows rows;
  int64_t depth, cols;
  Epilogue epilogue = Epilogue::kStore;
  Activation activation = Activation::kSwiglu;
  bool is_transposed = false;  // b has row_stride 1
  bool has_bias = false;
  int64_t padding = 0;       // elements between two rows, or columns, of b
  int64_t misalignment = 0;  // elements between an aligned address and every array
};

struct WeightCase {
  Rows rows;
  bool gathers_left;  // otherwise the right, if rows.top_k > 0
  int64_t out_rows, out_cols;
  int64_t misalignment = 0;
};

void check(const Family& family, DType dtype, const RowCase& problem);
void check(const Family& family, DType dtype, const WeightCase& problem);

/// Problems whose widths are multiples of 8 elements, with aligned arrays.
std::vector<RowCase> aligned_row_cases();
std::vector<WeightCase> aligned_weight_cases();
/// The others.
std::vector<RowCase> odd_row_cases();
std::vector<WeightCase> odd_weight_cases();

/// Checks every problem; tells the number of the one that failed.
template <typename Case>
void check_all(const Family& family, DType dtype, const std::vector<Case>& problems) {
  for (size_t i = 0; i < problems.size(); ++i) {
    try {
      check(family, dtype, problems[i]);
    } catch (const std::exception& error) {
      throw std::runtime_error("problem " + std::to_string(i) + ", " +
                               std::to_string(fomoe::size_of(dtype)) +
                               " bytes per element: " + error.what());
    }
  }
}

}  // namespace product_cases
