// SPDX-License-Identifier: Apache-2.0
// Accesses to global and shared memory of 1 to 16 bytes, and asynchronous copies between them.
// Under emulation every access is counted: bytes, sectors per warp request, bank conflicts.
#pragma once

#include "cuda/device.cuh"

namespace fomoe::cuda {

/// `bytes` consecutive bytes that move in one access: 1, 2, 4, 8 or 16.
template <int bytes>
struct alignas(bytes) Packet {
  unsigned char data[bytes];
};

#ifdef FOMOE_EMULATION

template <typename T>
__attribute__((noinline)) inline T load_global(const T* address) {
  emulation::note_access(emulation::Access::kGlobalLoad, address, sizeof(T),
                         __builtin_return_address(0));
  return *address;
}
template <typename T>
__attribute__((noinline)) inline T load_global_once(const T* address) {
  emulation::note_access(emulation::Access::kGlobalLoad, address, sizeof(T),
                         __builtin_return_address(0));
  return *address;
}
template <typename T>
__attribute__((noinline)) inline T load_global_once_if(bool condition, const T* address) {
  if (!condition) return T{};
  emulation::note_access(emulation::Access::kGlobalLoad, address, sizeof(T),
                         __builtin_return_address(0));
  return *address;
}
template <typename T>
__attribute__((noinline)) inline T load_global_past_l1(const T* address) {
  static_assert(sizeof(T) == 16);
  emulation::note_access(emulation::Access::kGlobalLoad, address, sizeof(T),
                         __builtin_return_address(0));
  return *address;
}
template <typename T>
__attribute__((noinline)) inline void store_global(T* address, T value) {
  emulation::note_access(emulation::Access::kGlobalStore, address, sizeof(T),
                         __builtin_return_address(0));
  *address = value;
}
template <typename T>
__attribute__((noinline)) inline T load_shared(const T* address) {
  emulation::note_access(emulation::Access::kSharedLoad, address, sizeof(T),
                         __builtin_return_address(0));
  return *address;
}
template <typename T>
__attribute__((noinline)) inline void store_shared(T* address, T value) {
  emulation::note_access(emulation::Access::kSharedStore, address, sizeof(T),
                         __builtin_return_address(0));
  emulation::asynchronous().shared.note_generic_write(address, sizeof(T));
  *address = value;
}

/// Copies 16 bytes, of which those past the first `valid_bytes` (0 to 16) are zeros, to shared
/// memory; done after cp_async_wait, or when the mbarrier it arrives on completes.
__attribute__((noinline)) inline void cp_async_16(void* shared, const void* global,
                                                  int valid_bytes = 16) {
  emulation::cp_async(shared, global, valid_bytes, __builtin_return_address(0));
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int groups_in_flight>
inline void cp_async_wait() {
  emulation::cp_async_wait(groups_in_flight);
}

#else

namespace detail {
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
}  // namespace detail

/// T as one machine word, so that a load of it is one instruction.
template <typename T>
using WordOf = typename detail::Word<sizeof(T)>::type;

/// Read-only data that other blocks read as well.
template <typename T>
FOMOE_DEVICE T load_global(const T* address) {
  const WordOf<T> word = __ldg(reinterpret_cast<const WordOf<T>*>(address));
  return reinterpret_cast<const T&>(word);
}
/// Data that is read once: evicted first.
template <typename T>
FOMOE_DEVICE T load_global_once(const T* address) {
  const WordOf<T> word = __ldcs(reinterpret_cast<const WordOf<T>*>(address));
  return reinterpret_cast<const T&>(word);
}
/// The same, or zeros. Of 16 bytes as one predicated instruction on cleared registers: left to the
/// compiler, the value is copied, and so waited for, before the loads that follow are issued.
template <typename T>
FOMOE_DEVICE T load_global_once_if(bool condition, const T* address) {
  if constexpr (sizeof(T) == 16) {
    uint4 word;
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
        " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
        " @p ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
        : "l"(address), "r"(static_cast<int>(condition)));
    return reinterpret_cast<const T&>(word);
  } else {
    T value = {};
    if (condition) value = load_global_once(address);
    return value;
  }
}
/// 16 bytes of a stream that takes no room in the L1 cache.
template <typename T>
FOMOE_DEVICE T load_global_past_l1(const T* address) {
  static_assert(sizeof(T) == 16);
  uint4 word;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
      : "l"(address));
  return reinterpret_cast<const T&>(word);
}
template <typename T>
FOMOE_DEVICE void store_global(T* address, T value) {
  *reinterpret_cast<WordOf<T>*>(address) = reinterpret_cast<const WordOf<T>&>(value);
}
template <typename T>
FOMOE_DEVICE T load_shared(const T* address) {
  const WordOf<T> word = *reinterpret_cast<const WordOf<T>*>(address);
  return reinterpret_cast<const T&>(word);
}
template <typename T>
FOMOE_DEVICE void store_shared(T* address, T value) {
  *reinterpret_cast<WordOf<T>*>(address) = reinterpret_cast<const WordOf<T>&>(value);
}

FOMOE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

FOMOE_DEVICE void cp_async_16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(valid_bytes)
      : "memory");
}
FOMOE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_in_flight>
FOMOE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_in_flight) : "memory");
}

#endif

/// Widest access, in bytes, that these addresses, row lengths or strides (all in bytes) allow.
template <typename... Multiples>
inline int widest_access(Multiples... multiples) {
  const uint64_t all = (static_cast<uint64_t>(multiples) | ...) | 16;
  return static_cast<int>(all & (~all + 1));
}
inline uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace fomoe::cuda
