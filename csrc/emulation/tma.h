// SPDX-License-Identifier: Apache-2.0
// TMA. A load lands after a random time, and until then its target holds NaN; a store reads its
// source as late as allowed. Found out: misaligned boxes, a target that a wgmma or a store may
// still read, a store of bytes that were written without fence.proxy.async, and a block that exits
// too early. Not modelled: which of the instruction's bytes land first.
#pragma once

#include <cstdint>

namespace fomoe::emulation {

/// An array of 2-byte elements with 128-byte swizzle, innermost dimension first.
struct BoxedArray {
  void* data;
  int rank;
  int64_t extents[5];
  int64_t strides[5];  // elements
  int box[5];
};

/// Fails if the hardware cannot describe the array so.
void check_array(const BoxedArray& array);

void tma_load(void* shared, const BoxedArray& array, void* barrier, const int (&position)[5]);
void tma_store(const BoxedArray& array, const void* shared, const int (&position)[5]);
void tma_commit();
void tma_wait_read(int groups_in_flight);
void fence_async_proxy();

}  // namespace fomoe::emulation
