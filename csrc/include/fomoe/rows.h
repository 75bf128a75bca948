// SPDX-License-Identifier: Apache-2.0
// Dense rows of one width whose element type is known at run time only.
#pragma once

#include <cstring>

#include "fomoe/dtype.h"
#include "fomoe/gemm.h"

namespace fomoe {

struct ConstRows {
  const void* data;
  DType dtype;
  int64_t width;

  const void* at(int64_t row) const {
    return static_cast<const char*>(data) + row * width * size_of(dtype);
  }
  Matrix run(int64_t first, int64_t count) const { return {at(first), count, width, width, 1}; }
};

struct Rows {
  void* data;
  DType dtype;
  int64_t width;

  void* at(int64_t row) const { return static_cast<char*>(data) + row * width * size_of(dtype); }
  DenseMatrix run(int64_t first, int64_t count) const { return {at(first), count, width}; }
  void fill_zero(int64_t first, int64_t count) const {
    if (count * width > 0) {
      std::memset(at(first), 0, static_cast<size_t>(count * width * size_of(dtype)));
    }
  }
};

}  // namespace fomoe
