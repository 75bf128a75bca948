// SPDX-License-Identifier: Apache-2.0
#include "cuda/product_cases.h"

namespace product_cases {
namespace {

constexpr Activation kActivations[] = {Activation::kSwiglu, Activation::kSilu,
                                       Activation::kSwigluClamped};

/// The products of an expert of these widths, forward and backward, with every activation.
void append_expert(std::vector<RowCase>& problems, const Rows& rows, int64_t dim,
                   int64_t expert_dim, int64_t misalignment) {
  for (const Activation activation : kActivations) {
    const int64_t pre_dim = expert_dim * (fomoe::is_gated(activation) ? 2 : 1);
    RowCase up = {.rows = rows, .depth = dim, .cols = pre_dim, .epilogue = Epilogue::kActivate};
    up.activation = activation;
    up.is_transposed = true;
    up.has_bias = activation != Activation::kSilu;
    up.misalignment = misalignment;
    problems.push_back(up);
    RowCase backward = {.rows = rows, .depth = dim, .cols = expert_dim};
    backward.epilogue = Epilogue::kActivateBackward;
    backward.activation = activation;
    backward.misalignment = misalignment;
    problems.push_back(backward);
  }
}

}  // namespace

std::vector<RowCase> aligned_row_cases() {
  std::vector<RowCase> problems = {
      {.rows = {{5}}, .depth = 8, .cols = 8},
      {.rows = {{0, 130, 1, 0, 64}}, .depth = 72, .cols = 136, .is_transposed = true},
      {.rows = {{3, 200}, 2}, .depth = 40, .cols = 64, .has_bias = true, .padding = 8},
      {.rows = {{70, 9, 70}, 0, 1}, .depth = 24, .cols = 72},
      {.rows = {{3}, 1}, .depth = 536, .cols = 8, .is_transposed = true, .padding = 16},
      {.rows = {{2, 1}}, .depth = 16, .cols = 520, .has_bias = true},
      {.rows = {{4, 1}}, .depth = 0, .cols = 16, .has_bias = true},
      {.rows = {{4}}, .depth = 8, .cols = 0},
      {.rows = {{0, 0}}, .depth = 8, .cols = 8},
      {.rows = {{0}, 2}, .depth = 8, .cols = 16, .epilogue = Epilogue::kActivate},
  };
  append_expert(problems, {{3, 0, 140}, 3}, 40, 24, 0);
  append_expert(problems, {{2, 9}, 2}, 16, 200, 0);
  return problems;
}

std::vector<RowCase> odd_row_cases() {
  std::vector<RowCase> problems = {
      {.rows = {{1}}, .depth = 1, .cols = 1},
      {.rows = {{0, 130, 2}}, .depth = 37, .cols = 67, .is_transposed = true, .padding = 1},
      {.rows = {{3, 129}, 3}, .depth = 19, .cols = 65, .has_bias = true, .padding = 3},
      {.rows = {{7, 3}}, .depth = 16, .cols = 64, .misalignment = 1},
      {.rows = {{7, 3}, 2}, .depth = 33, .cols = 5, .is_transposed = true, .misalignment = 1},
  };
  append_expert(problems, {{3, 0, 131}, 3}, 7, 35, 1);
  append_expert(problems, {{2, 1}, 1}, 17, 1, 0);
  return problems;
}

std::vector<WeightCase> aligned_weight_cases() {
  return {
      {.rows = {{5}}, .gathers_left = false, .out_rows = 8, .out_cols = 8},
      {.rows = {{0, 130, 1, 0, 64}}, .gathers_left = false, .out_rows = 72, .out_cols = 136},
      {.rows = {{0, 130, 9, 64}, 2}, .gathers_left = true, .out_rows = 136, .out_cols = 24},
      {.rows = {{40, 0, 200}, 3}, .gathers_left = false, .out_rows = 40, .out_cols = 200},
      {.rows = {{70, 9, 65}, 0, 1}, .gathers_left = false, .out_rows = 64, .out_cols = 64},
      {.rows = {{70, 1, 65}, 1, 0}, .gathers_left = true, .out_rows = 8, .out_cols = 328},
      {.rows = {{0, 0}}, .gathers_left = false, .out_rows = 16, .out_cols = 8},
      {.rows = {{3}}, .gathers_left = false, .out_rows = 0, .out_cols = 8},
  };
}

std::vector<WeightCase> odd_weight_cases() {
  return {
      {.rows = {{1}}, .gathers_left = false, .out_rows = 1, .out_cols = 1},
      {.rows = {{0, 130, 1}, 2}, .gathers_left = true, .out_rows = 67, .out_cols = 35},
      {.rows = {{17, 0, 33}, 3}, .gathers_left = false, .out_rows = 5, .out_cols = 131},
      {.rows = {{17, 5}}, .gathers_left = false, .out_rows = 64, .out_cols = 8, .misalignment = 1},
  };
}

}  // namespace product_cases
