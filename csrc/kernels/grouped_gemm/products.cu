// SPDX-License-Identifier: Apache-2.0
// Which family of kernels computes a product.
#include "grouped_gemm/products.h"

namespace fomoe::cuda {
int64_t num_weight_parts(KernelPath path, int64_t expert_dim) {
  switch (path) {
    case KernelPath::kSimple:
      return simple::num_weight_parts(expert_dim);
    case KernelPath::kSm80:
      return sm80::num_weight_parts(expert_dim);
    case KernelPath::kSm90:
      return sm90::num_weight_parts(expert_dim);
  }
  return 0;
}

void multiply(KernelPath path, const RowProduct& product, Stream stream) {
  switch (path) {
    case KernelPath::kSimple:
      return simple::multiply(product, stream);
    case KernelPath::kSm80:
      return sm80::multiply(product, stream);
    case KernelPath::kSm90:
      return sm90::multiply(product, stream);
  }
}

void multiply(KernelPath path, const WeightProduct& product, Stream stream) {
  switch (path) {
    case KernelPath::kSimple:
      return simple::multiply(product, stream);
    case KernelPath::kSm80:
      return sm80::multiply(product, stream);
    case KernelPath::kSm90:
      return sm90::multiply(product, stream);
  }
}

}  // namespace fomoe::cuda
