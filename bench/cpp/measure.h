// SPDX-License-Identifier: Apache-2.0
// One measurement: the op and its ceilings in turns, and a line of JSON.
//
// Two times are comparable only when they were taken a moment apart: clocks and power change. So
// every repetition runs the op, a copy of as many bytes and a dense product of as many FLOPs, and
// a ratio is the median of the ratios within the repetitions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "cublas.h"
#include "device.h"
#include "json.h"
#include "ops.h"

namespace bench {

struct Spread {
  double low, median, high, best;  // quartiles, interpolated linearly
};
Spread spread(std::vector<double> numbers);

/// Of the ratios numerators[i] / denominators[i].
Spread paired_ratio(const std::vector<double>& numerators, const std::vector<double>& denominators);

/// Microseconds of each stopwatch in each repetition, whose order changes: at least 10 and for
/// about `seconds` in all, or one if that is 0.
std::vector<std::vector<double>> interleave(const std::vector<Stopwatch*>& stopwatches,
                                            double seconds);

struct Measurement {
  Json labels;  // op, shape, sizes, dtype, ...: the beginning of the line
  fomoe::DType dtype;
  Work work;
  int num_sets;
  double bytes;                     // that have to move
  double flops = 0;                 // of matrix products
  std::vector<DenseProduct> dense;  // of as many FLOPs
};

class Session {
 public:
  Session(const Program& program, const Arguments& arguments);

  const Arguments& arguments() const { return arguments_; }
  Device& device() { return *device_; }
  Ops& ops() { return *ops_; }
  ProductOps& product_ops() { return *product_ops_; }
  bool wants(const std::string& op) const;

  /// How many sets of arrays of this size are more than three caches; 1 for warm ones.
  int num_sets(int64_t bytes_of_a_set) const;
  /// The path asked for, or the one choose_path takes. Throws UsageError when the operands or the
  /// device do not allow it.
  fomoe::KernelPath path(const std::optional<fomoe::KernelPath>& wanted,
                         const fomoe::ProductOperands& operands) const;

  std::unique_ptr<Stopwatch> stopwatch(const Work& work, int num_sets);
  /// The beginning of a line.
  Json labels(const char* op, const Shape& shape, const char* dtype) const;
  void measure(const Measurement& measurement);
  void print(const Json& line) const;

 private:
  const Program& program_;
  const Arguments& arguments_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<ProductOps> product_ops_;
  std::unique_ptr<DenseLibrary> dense_;
};

/// median_us, quartiles_us, best_us and runs.
void add_times(Json& line, const std::vector<double>& microseconds);

}  // namespace bench
