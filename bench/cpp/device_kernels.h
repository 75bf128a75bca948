// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bench {

/// Copies whole 16-byte units between aligned arrays.
void launch_copy(void* target, const void* source, int64_t bytes, cudaStream_t stream);

/// Reads an aligned array, so that nothing else is left in the cache; writes nothing, so that
/// nothing waits to be written back.
void launch_read(const void* source, int64_t bytes, int* never_written, cudaStream_t stream);

}  // namespace bench
