// SPDX-License-Identifier: Apache-2.0
#include "cuda/product_cases.h"

#include <cmath>
#include <numeric>

namespace product_cases {
namespace {

using fomoe::ExpertMatrices;
using fomoe::cuda::RowTile;
using Doubles = std::vector<double>;

/// Rounded to dtype.
Doubles random_array(DType dtype, int64_t count, uint32_t seed) {
  return samples::Array(dtype, harness::random_values(count, seed)).values();
}

/// The sums are in float32, or float64 for float64.
double tolerance(DType dtype, int64_t terms) {
  const double of_a_sum = dtype == DType::kFloat64 ? 2e-16 : 1e-7;
  return 2 * samples::tolerance(dtype) + of_a_sum * static_cast<double>(terms);
}

/// NaN exactly where NaN is expected, and close elsewhere.
void check_close(const Doubles& actual, const Doubles& expected, double tolerance,
                 const char* what) {
  CHECK_EQUAL(actual.size(), expected.size());
  Doubles numbers, expected_numbers;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) != std::isnan(expected[i])) {
      throw std::runtime_error(std::string(what) + "[" + std::to_string(i) + "] is " +
                               harness::show(actual[i]) + ", expected " +
                               harness::show(expected[i]));
    }
    if (std::isnan(expected[i])) continue;
    numbers.push_back(actual[i]);
    expected_numbers.push_back(expected[i]);
  }
  const double error = samples::relative_error(numbers, expected_numbers);
  if (!(error <= tolerance)) {
    throw std::runtime_error(std::string(what) + " has a relative error of " +
                             harness::show(error) + ", allowed is " + harness::show(tolerance));
  }
}

/// The tables of Rows.
struct Tables {
  explicit Tables(const Rows& rows) : offsets(rows.per_expert.size() + 1) {
    std::partial_sum(rows.per_expert.begin(), rows.per_expert.end(), offsets.begin() + 1);
    executed = offsets.back();
    const int64_t top_k = std::max<int64_t>(rows.top_k, 1);
    num_tokens = (executed + 5 + top_k - 1) / top_k;
    num_rows = num_tokens * top_k;
    slots.resize(num_rows);
    std::iota(slots.begin(), slots.end(), 0);
    std::mt19937 engine(9);
    for (size_t i = slots.size() - 1; i > 0; --i) std::swap(slots[i], slots[engine() % (i + 1)]);
    std::fill(slots.begin() + executed, slots.end(), -1);
    if (executed > 2) {  // two indices that lead outside
      slots[executed / 2] = static_cast<int32_t>(num_rows);
      slots[executed - 1] = -7;
    }
    for (int32_t e = 0; e + 1 < static_cast<int32_t>(offsets.size()); ++e) {
      for (int32_t r = offsets[e]; r < offsets[e + 1]; r += fomoe::cuda::kTileRows) {
        tiles.push_back({e, r, std::min(r + fomoe::cuda::kTileRows, offsets[e + 1]), 0});
      }
    }
  }

  bool is_valid(int64_t row) const { return 0 <= slots[row] && slots[row] < num_rows; }
  int64_t expert_of(int64_t row) const {
    return std::upper_bound(offsets.begin(), offsets.end(), row) - offsets.begin() - 1;
  }

  std::vector<int32_t> offsets, slots;
  std::vector<RowTile> tiles;
  int64_t executed, num_tokens, num_rows;
};

/// A RowSource, and what each executed row of it is.
struct Source {
  Source(DType dtype, const Rows& rows, const Tables& tables, bool gathers, int64_t width,
         uint32_t seed, int64_t misalignment)
      : values(host_values(dtype, rows, tables, gathers, width, seed)),
        array(dtype, values, misalignment),
        rows_of_product(tables.executed * width) {
    for (int64_t r = 0; r < tables.executed; ++r) {
      const bool is_zero = gathers && !tables.is_valid(r);
      const int64_t row = gathers ? tables.slots[r] / rows.top_k : r;
      for (int64_t k = 0; k < width; ++k) {
        rows_of_product[r * width + k] = is_zero ? 0 : values[row * width + k];
      }
    }
  }

  fomoe::cuda::RowSource view(const Rows& rows, const Tables& tables, bool gathers,
                              const int32_t* slots) const {
    return {array.data(), gathers ? tables.num_tokens : tables.num_rows, gathers ? slots : nullptr,
            rows.top_k};
  }

  static Doubles host_values(DType dtype, const Rows& rows, const Tables& tables, bool gathers,
                             int64_t width, uint32_t seed) {
    const int64_t count = gathers ? tables.num_tokens : tables.num_rows;
    Doubles result = random_array(dtype, count * width, seed);
    std::vector<bool> is_used(count, false);
    for (int64_t r = 0; r < tables.executed; ++r) {
      if (gathers && tables.is_valid(r)) is_used[tables.slots[r] / rows.top_k] = true;
      if (!gathers) is_used[r] = tables.expert_of(r) != rows.nan_expert;
    }
    for (int64_t i = 0; i < count * width; ++i) {
      if (!is_used[i / width]) result[i] = NAN;
    }
    return result;
  }

  Doubles values;
  on_device::Array array;
  Doubles rows_of_product;  // [executed, width]
};

/// b, with NaN in the padding and in the matrices that no row meets.
struct Matrices {
  Matrices(DType dtype, const RowCase& problem)
      : problem(problem),
        values(host_values(dtype, problem)),
        array(dtype, values, problem.misalignment) {}

  static int64_t stride(const RowCase& problem) {
    return (problem.is_transposed ? problem.depth : problem.cols) + problem.padding;
  }
  static int64_t expert_stride(const RowCase& problem) {
    return stride(problem) * (problem.is_transposed ? problem.cols : problem.depth) +
           2 * problem.padding;
  }
  static int64_t index(const RowCase& problem, int64_t expert, int64_t row, int64_t col) {
    return expert * expert_stride(problem) +
           (problem.is_transposed ? col * stride(problem) + row : row * stride(problem) + col);
  }
  static Doubles host_values(DType dtype, const RowCase& problem) {
    const auto num_experts = static_cast<int64_t>(problem.rows.per_expert.size());
    const int64_t count = num_experts * expert_stride(problem);
    const Doubles numbers = random_array(dtype, count, 3);
    Doubles result(count, NAN);
    for (int64_t e = 0; e < num_experts; ++e) {
      if (problem.rows.per_expert[e] == 0) continue;
      for (int64_t i = 0; i < problem.depth; ++i) {
        for (int64_t j = 0; j < problem.cols; ++j) {
          result[index(problem, e, i, j)] = numbers[index(problem, e, i, j)];
        }
      }
    }
    return result;
  }

  ExpertMatrices view(DType dtype) const {
    const auto num_experts = static_cast<int64_t>(problem.rows.per_expert.size());
    return {dtype,
            array.data(),
            num_experts,
            problem.depth,
            problem.cols,
            expert_stride(problem),
            problem.is_transposed ? 1 : stride(problem),
            problem.is_transposed ? stride(problem) : 1};
  }

  const RowCase& problem;
  Doubles values;
  on_device::Array array;
};

/// [executed, cols].
Doubles expected_sums(const RowCase& problem, const Tables& tables, const Source& source,
                      const Matrices& b, const Doubles& bias) {
  Doubles sums(tables.executed * problem.cols);
  for (int64_t r = 0; r < tables.executed; ++r) {
    const int64_t expert = tables.expert_of(r);
    const double* row = source.rows_of_product.data() + r * problem.depth;
    for (int64_t c = 0; c < problem.cols; ++c) {
      double sum = problem.has_bias ? bias[expert * problem.cols + c] : 0;
      for (int64_t k = 0; k < problem.depth; ++k) {
        sum += row[k] * b.values[Matrices::index(problem, expert, k, c)];
      }
      sums[r * problem.cols + c] = sum;
    }
  }
  return sums;
}

/// Rows that a product writes.
struct Output {
  Output(DType dtype, int64_t num_rows, int64_t width, int64_t misalignment)
      : dtype(dtype), width(width), array(dtype, num_rows * width, misalignment) {}

  /// Of the executed rows; the others must not have been written.
  Doubles values(int64_t executed) const {
    const samples::Array host = array.host();
    const auto* bytes = static_cast<const unsigned char*>(host.data());
    Doubles result = host.values();
    const auto count = static_cast<int64_t>(result.size()) * fomoe::size_of(dtype);
    for (int64_t i = executed * width * fomoe::size_of(dtype); i < count; ++i) {
      CHECK_EQUAL(static_cast<int>(bytes[i]), 0xFF);
    }
    result.resize(executed * width);
    return result;
  }

  DType dtype;
  int64_t width;
  on_device::Array array;
};

fomoe::Activated<double> activated(Activation activation, double gate, double up) {
  fomoe::Activated<double> result{};
  fomoe::dispatch(activation, [&](auto tag) { result = fomoe::activated<tag>(gate, up); });
  return result;
}

/// One problem on the device.
struct RowProblem {
  RowProblem(DType dtype, const RowCase& problem)
      : dtype(dtype),
        problem(problem),
        tables(problem.rows),
        gathers(problem.rows.top_k > 0),
        source(dtype, problem.rows, tables, gathers, problem.depth, 1, problem.misalignment),
        b(dtype, problem),
        bias(random_array(dtype, problem.rows.per_expert.size() * problem.cols, 4)),
        sums(expected_sums(problem, tables, source, b, bias)),
        expert_dim(problem.epilogue == Epilogue::kActivate && fomoe::is_gated(problem.activation)
                       ? problem.cols / 2
                       : problem.cols),
        pre_dim(expert_dim * (fomoe::is_gated(problem.activation) ? 2 : 1)),
        slots(tables.slots),
        tiles(tables.tiles),
        tile_count(std::vector<int32_t>{static_cast<int32_t>(tables.tiles.size())}),
        device_bias(dtype, bias, problem.misalignment) {}

  RowProduct product() const {
    RowProduct result = {};
    result.source = source.view(problem.rows, tables, gathers, slots.data());
    result.b = b.view(dtype);
    result.bias = problem.has_bias ? device_bias.data() : nullptr;
    result.num_rows = tables.num_rows;
    result.tiles = {tiles.data(), tile_count.data(),
                    fomoe::cuda::most_row_tiles(tables.num_rows, problem.rows.per_expert.size())};
    result.epilogue = problem.epilogue;
    result.activation = problem.activation;
    return result;
  }

  Output output(int64_t width) const {
    return Output(dtype, tables.num_rows, width, problem.misalignment);
  }
  double tolerance() const { return product_cases::tolerance(dtype, problem.depth); }

  DType dtype;
  const RowCase& problem;
  Tables tables;
  bool gathers;
  Source source;
  Matrices b;
  Doubles bias, sums;
  int64_t expert_dim, pre_dim;
  on_device::Vector<int32_t> slots;
  on_device::Vector<RowTile> tiles;
  on_device::Vector<int32_t> tile_count;
  on_device::Array device_bias;
};

void check_store(const Family& family, const RowProblem& on_gpu) {
  const Output out = on_gpu.output(on_gpu.problem.cols);
  RowProduct product = on_gpu.product();
  product.out = out.array.data();
  family.multiply_rows(product);
  check_close(out.values(on_gpu.tables.executed), on_gpu.sums, on_gpu.tolerance(), "out");
}

void check_activate(const Family& family, const RowProblem& on_gpu) {
  const int64_t executed = on_gpu.tables.executed, expert_dim = on_gpu.expert_dim;
  const Output pre = on_gpu.output(on_gpu.pre_dim), hidden = on_gpu.output(expert_dim);
  const Output hidden_alone = on_gpu.output(expert_dim);
  RowProduct product = on_gpu.product();
  product.pre = pre.array.data();
  product.hidden = hidden.array.data();
  family.multiply_rows(product);
  check_close(pre.values(executed), on_gpu.sums, on_gpu.tolerance(), "pre");
  const Doubles rounded = pre.values(executed);
  Doubles expected(executed * expert_dim);
  for (int64_t i = 0; i < executed * expert_dim; ++i) {
    const double* gate = rounded.data() + i / expert_dim * on_gpu.pre_dim + i % expert_dim;
    const double up = fomoe::is_gated(on_gpu.problem.activation) ? gate[expert_dim] : 0;
    expected[i] = activated(on_gpu.problem.activation, *gate, up).value;
  }
  check_close(hidden.values(executed), expected, tolerance(on_gpu.dtype, 1), "hidden");
  product.pre = nullptr;
  product.hidden = hidden_alone.array.data();
  family.multiply_rows(product);
  CHECK(hidden_alone.array.host().bytes() == hidden.array.host().bytes());
}

void check_activate_backward(const Family& family, const RowProblem& on_gpu) {
  const Tables& tables = on_gpu.tables;
  const int64_t executed = tables.executed, expert_dim = on_gpu.expert_dim;
  const int64_t pre_dim = on_gpu.pre_dim, parts = family.num_weight_parts(expert_dim);
  const DType dtype = on_gpu.dtype, accumulate = samples::accumulate_dtype(dtype);
  Doubles pre = random_array(dtype, tables.num_rows * pre_dim, 5);
  for (double& value : pre) value *= 8;  // also beyond the limits of the clamped activation
  std::fill(pre.begin() + executed * pre_dim, pre.end(), NAN);
  const Doubles weights = random_array(accumulate, tables.num_rows, 6);
  const on_device::Array device_pre(dtype, pre, on_gpu.problem.misalignment);
  const on_device::Array device_weights(accumulate, weights, on_gpu.problem.misalignment);
  const Output hidden = on_gpu.output(expert_dim), d_pre = on_gpu.output(pre_dim);
  const Output weight_parts(accumulate, tables.num_rows, parts, on_gpu.problem.misalignment);

  Doubles expected_hidden(executed * expert_dim), expected_d_pre(executed * pre_dim);
  Doubles expected_dots(executed), dots(executed);
  for (int64_t r = 0; r < executed; ++r) {
    // A row from nowhere counts for nothing.
    const double weight = tables.is_valid(r) ? weights[tables.slots[r]] : 0;
    for (int64_t f = 0; f < expert_dim; ++f) {
      const double* gate = pre.data() + r * pre_dim + f;
      const bool is_gated = pre_dim > expert_dim;
      const auto act =
          activated(on_gpu.problem.activation, *gate, is_gated ? gate[expert_dim] : 0.0);
      const double d_hidden = on_gpu.sums[r * expert_dim + f];
      expected_hidden[r * expert_dim + f] = weight * act.value;
      expected_d_pre[r * pre_dim + f] = weight * d_hidden * act.d_gate;
      if (is_gated) expected_d_pre[r * pre_dim + expert_dim + f] = weight * d_hidden * act.d_up;
      expected_dots[r] += d_hidden * act.value;
    }
  }

  RowProduct product = on_gpu.product();
  product.pre = device_pre.data();
  product.weights = device_weights.data();
  product.hidden = hidden.array.data();
  product.d_pre = d_pre.array.data();
  product.weight_parts = weight_parts.array.data();
  family.multiply_rows(product);
  check_close(hidden.values(executed), expected_hidden, on_gpu.tolerance(), "hidden");
  check_close(d_pre.values(executed), expected_d_pre, on_gpu.tolerance(), "d_pre");
  const Doubles sums = weight_parts.values(executed);
  for (int64_t i = 0; i < executed * parts; ++i) dots[i / parts] += sums[i];
  check_close(dots, expected_dots, tolerance(accumulate, on_gpu.problem.depth + expert_dim) * 4,
              "weight_parts");
}

}  // namespace

void check(const Family& family, DType dtype, const RowCase& problem) {
  const RowProblem on_gpu(dtype, problem);
  switch (problem.epilogue) {
    case Epilogue::kStore:
      return check_store(family, on_gpu);
    case Epilogue::kActivate:
      return check_activate(family, on_gpu);
    case Epilogue::kActivateBackward:
      return check_activate_backward(family, on_gpu);
  }
}

void check(const Family& family, DType dtype, const WeightCase& problem) {
  const Rows& rows = problem.rows;
  const Tables tables(rows);
  const bool gathers_left = rows.top_k > 0 && problem.gathers_left;
  const bool gathers_right = rows.top_k > 0 && !problem.gathers_left;
  const int64_t out_rows = problem.out_rows, out_cols = problem.out_cols;
  const Source left(dtype, rows, tables, gathers_left, out_rows, 1, problem.misalignment);
  const Source right(dtype, rows, tables, gathers_right, out_cols, 2, problem.misalignment);
  const on_device::Vector<int32_t> slots(tables.slots), offsets(tables.offsets);
  const auto num_experts = static_cast<int64_t>(rows.per_expert.size());
  const on_device::Array out(dtype, num_experts * out_rows * out_cols, problem.misalignment);

  Doubles expected(num_experts * out_rows * out_cols);
  for (int64_t r = 0; r < tables.executed; ++r) {
    for (int64_t i = 0; i < out_rows; ++i) {
      for (int64_t j = 0; j < out_cols; ++j) {
        expected[(tables.expert_of(r) * out_rows + i) * out_cols + j] +=
            left.rows_of_product[r * out_rows + i] * right.rows_of_product[r * out_cols + j];
      }
    }
  }
  family.multiply_weights({dtype, left.view(rows, tables, gathers_left, slots.data()),
                           right.view(rows, tables, gathers_right, slots.data()), tables.num_rows,
                           offsets.data(), num_experts, out_rows, out_cols, out.data()});
  check_close(out.values(), expected, tolerance(dtype, tables.executed), "out");
}

}  // namespace product_cases
