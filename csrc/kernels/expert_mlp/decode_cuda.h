// SPDX-License-Identifier: Apache-2.0
// Products of few rows per expert, where reading the weights is all that takes time: on CUDA cores,
// without tiles of rows that would be mostly empty.
#pragma once

#include "grouped_gemm/products.h"

namespace fomoe::cuda::decode {

/// Whether these kernels are the faster ones, by what the host knows: fewer than two rows per
/// expert on average, or 16 rows in all. Never where the matrices are not [E, cols, depth], 16-bit
/// and aligned.
bool is_faster(KernelPath path, const ExpertMatrices& b, int64_t num_rows);

/// As the product of the other families, without its tiles; kStore and kActivate only. Up to
/// kTokens rows of an expert read its matrix once.
void multiply(const RowProduct& product, const int32_t* offsets, Stream stream);

inline constexpr int kTokens = 4;

}  // namespace fomoe::cuda::decode
