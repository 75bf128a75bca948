// SPDX-License-Identifier: Apache-2.0
// Atomics on integers. Kernels use none on floating point numbers, whose sums would depend on the
// order.
#pragma once

#include <atomic>
#include <concepts>

template <std::integral T>
inline T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value);
}
template <std::integral T>
inline T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_or(value);
}
template <std::integral T>
inline T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).exchange(value);
}
