// SPDX-License-Identifier: Apache-2.0
// TMA: one thread copies a box of an array between global and shared memory. Hopper only.
#pragma once

#include "cuda/barrier.cuh"
#include "cuda/tensor_map.h"

namespace fomoe::cuda {

#ifdef FOMOE_EMULATION

inline emulation::BoxedArray array_of(const TensorMap& map) {
  emulation::BoxedArray array;
  std::memcpy(&array, &map, sizeof(array));
  return array;
}
inline void tma_prefetch(const TensorMap&) {}
inline void tma_load(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y) {
  emulation::tma_load(shared, array_of(map), &barrier, {x, y, 0, 0, 0});
}
inline void tma_load(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y, int z) {
  emulation::tma_load(shared, array_of(map), &barrier, {x, y, z, 0, 0});
}
inline void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  emulation::tma_store(array_of(map), shared, {x, y, z, 0, 0});
}
inline void tma_commit() { emulation::tma_commit(); }
template <int groups_in_flight>
inline void tma_wait_read() {
  emulation::tma_wait_read(groups_in_flight);
}
inline void fence_async_proxy() { emulation::fence_async_proxy(); }

#else

/// Fetches the map itself.
FOMOE_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
/// Loads the box whose first element is at (x, y[, z]), innermost coordinate first; its bytes,
/// those outside of the array included, count on the barrier.
FOMOE_DEVICE void tma_load(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y)
      : "memory");
}
FOMOE_DEVICE void tma_load(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y,
                           int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
FOMOE_DEVICE void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
/// Closes a group of the thread's stores.
FOMOE_DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Waits until at most so many of the newest groups may still read shared memory.
template <int groups_in_flight>
FOMOE_DEVICE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups_in_flight) : "memory");
}
/// Between ordinary writes of shared memory (cp.async too) and TMA or wgmma that read it.
FOMOE_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace fomoe::cuda
