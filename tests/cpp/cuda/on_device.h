// SPDX-License-Identifier: Apache-2.0
// Arrays where CUDA kernels can reach them: on the GPU, or on the heap under emulation. A block of
// memory ends with its array, so that a sanitizer sees an overrun.
#pragma once

#include <cstdint>
#include <vector>

#include "fomoe/dtype.h"
#include "fomoe/kernel_path.h"
#include "fomoe/routing.h"
#include "samples.h"

namespace on_device {

void* allocate(int64_t bytes);  // 256-byte aligned
void release(void* memory);
void copy_to(void* target, const void* host, int64_t bytes);
void copy_from(void* host, const void* source, int64_t bytes);
/// Waits for the kernels; throws what went wrong in them.
void synchronize();

class Memory {
 public:
  /// `offset` bytes after an aligned address; filled with NaN.
  explicit Memory(int64_t bytes, int64_t offset = 0)
      : bytes_(bytes), offset_(offset), base_(static_cast<char*>(allocate(offset + bytes))) {
    const std::vector<char> poison(bytes, static_cast<char>(0xFF));
    copy_to(data(), poison.data(), bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { release(base_); }

  void* data() const { return base_ + offset_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_, offset_;
  char* base_;
};

template <typename T>
class Vector {
 public:
  explicit Vector(const std::vector<T>& values) : Vector(static_cast<int64_t>(values.size())) {
    copy_to(memory_.data(), values.data(), memory_.bytes());
  }
  explicit Vector(int64_t count) : memory_(count * static_cast<int64_t>(sizeof(T))) {}

  T* data() const { return static_cast<T*>(memory_.data()); }
  std::vector<T> values() const {
    synchronize();
    std::vector<T> result(memory_.bytes() / sizeof(T));
    copy_from(result.data(), memory_.data(), memory_.bytes());
    return result;
  }

 private:
  Memory memory_;
};

/// Floating point values of any dtype, NaN where none are given.
class Array {
 public:
  using DType = fomoe::DType;

  /// `misalignment`: elements between an aligned address and the first.
  Array(DType dtype, const std::vector<double>& values, int64_t misalignment = 0)
      : Array(dtype, static_cast<int64_t>(values.size()), misalignment) {
    const samples::Array host(dtype, values);
    copy_to(memory_.data(), host.data(), memory_.bytes());
  }
  Array(DType dtype, int64_t count, int64_t misalignment = 0)
      : dtype_(dtype),
        memory_(count * fomoe::size_of(dtype), misalignment * fomoe::size_of(dtype)) {}

  void* data() const { return memory_.data(); }
  std::vector<double> values() const { return host().values(); }
  samples::Array host() const {
    synchronize();
    samples::Array result(dtype_, memory_.bytes() / fomoe::size_of(dtype_));
    copy_from(result.data(), memory_.data(), memory_.bytes());
    return result;
  }

 private:
  DType dtype_;
  Memory memory_;
};

/// Every family of matrix kernels that can take the operands here: the simple ones, and those on
/// tensor cores.
inline std::vector<fomoe::KernelPath> paths_for(const fomoe::ProductOperands& operands) {
  using fomoe::KernelPath;
  if (fomoe::obstacle_to_tensor_cores(operands)) return {KernelPath::kSimple};
  const int capability = fomoe::cuda_compute_capability();
  const bool is_hopper = capability == 90 || capability == 0;  // 0: emulated
  if (!is_hopper) return {KernelPath::kSimple, KernelPath::kSm80};
  return {KernelPath::kSimple, KernelPath::kSm80, KernelPath::kSm90};
}

/// The tables of a routing.
class Routing {
 public:
  explicit Routing(const fomoe::Routing& host)
      : slot_to_row_(copy(host.slot_to_row, host.num_rows())),
        row_to_slot_(copy(host.row_to_slot, host.num_rows())),
        offsets_(copy(host.offsets, host.num_local_experts + 1)),
        view{slot_to_row_.data(), row_to_slot_.data(), offsets_.data(),
             host.num_tokens,     host.top_k,          host.num_local_experts} {}

 private:
  static std::vector<int32_t> copy(const int32_t* values, int64_t count) {
    return std::vector<int32_t>(values, values + count);
  }
  Vector<int32_t> slot_to_row_, row_to_slot_, offsets_;

 public:
  const fomoe::Routing view;
};

}  // namespace on_device
