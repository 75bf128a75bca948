// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fomoe/gemm.h"

namespace fomoe::cpu {

/// c = a b + bias in bfloat16 with the processor's dot-product instructions. False, and nothing is
/// done, where the processor has none, or where a library does better: with AMX, or when a row of a
/// is too long for a block to stay in the cache.
bool multiply_bf16(const Matrix& a, const Matrix& b, const void* bias, const DenseMatrix& c);

}  // namespace fomoe::cpu
