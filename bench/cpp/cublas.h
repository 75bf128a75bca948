// SPDX-License-Identifier: Apache-2.0
// The dense product as cuBLAS computes it: the ceiling of the grouped ones.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device.h"

namespace bench {

/// out [rows, cols] = left [rows, depth] times right [cols, depth] transposed: both dense along the
/// terms of the sums, which is the layout of a Linear layer.
struct DenseProduct {
  int64_t rows, cols, depth;
};

class DenseLibrary {
 public:
  virtual ~DenseLibrary() = default;
  virtual std::string name() const = 0;
  /// The products one after the other, on random matrices of its own.
  virtual Work products(fomoe::DType dtype, const std::vector<DenseProduct>& products) = 0;
};

/// cuBLAS of the file, or, with an empty name, where the system finds one; nullptr without.
/// Throws UsageError when a file was named and is none.
std::unique_ptr<DenseLibrary> open_cublas(const std::string& file, Device& device);

}  // namespace bench
