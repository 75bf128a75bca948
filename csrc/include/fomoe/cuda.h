// SPDX-License-Identifier: Apache-2.0
// What the CUDA entry points of every op have in common. They launch on the stream they are given,
// on the current device, and return: no allocation, no synchronisation, no read of device data by
// the host, so that they can be captured in a CUDA graph. Arrays and the workspace lie in device
// memory. Indices that would lead outside an array are treated as -1, offsets are clamped: wrong
// tables give wrong values, never an illegal access.
//
// Throw std::runtime_error when a launch fails.
#pragma once

namespace fomoe::cuda {

/// A cudaStream_t, opaque so that callers need no CUDA toolkit; nullptr is the default stream.
using Stream = void*;

}  // namespace fomoe::cuda
