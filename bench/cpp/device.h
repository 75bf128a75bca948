// SPDX-License-Identifier: Apache-2.0
// Where a benchmark runs: memory, and a clock for work on it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fomoe/cuda.h"
#include "fomoe/dtype.h"

namespace bench {

/// Something to time. work(set) uses the arrays of that set only and, on a GPU, only launches.
using Work = std::function<void(int set)>;

/// Times one piece of work, again and again.
class Stopwatch {
 public:
  virtual ~Stopwatch() = default;
  /// Microseconds per call.
  virtual double run() = 0;
  /// Calls in one run.
  virtual int calls() const = 0;
};

struct TimingOptions {
  bool cold;   // operands come from memory, not from a cache
  bool graph;  // on a GPU: calls in a CUDA graph
};

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;
  virtual int compute_capability() const = 0;  // 10 * major + minor; 0 for the CPU
  virtual int num_threads() const = 0;         // of the CPU; 0 on a GPU
  virtual int64_t cache_bytes() const = 0;     // of the last level
  virtual fomoe::cuda::Stream stream() const = 0;

  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* memory) = 0;
  /// From host or device memory to either; returns when done.
  virtual void copy(void* target, const void* source, int64_t bytes) = 0;
  /// Ways to copy `bytes` from source to target, by name.
  virtual std::vector<std::pair<std::string, Work>> copies(
      const std::vector<std::pair<void*, const void*>>& target_and_source, int64_t bytes) = 0;
  /// Calls the work once, so that what it does the first time is not timed.
  virtual std::unique_ptr<Stopwatch> stopwatch(Work work, int num_sets,
                                               const TimingOptions& options) = 0;
};

/// "cpu" or "cuda". Throws UsageError where there is none.
std::unique_ptr<Device> open_device(const std::string& name);

class Memory {
 public:
  Memory(Device& device, int64_t bytes)
      : device_(&device), bytes_(bytes), data_(device.allocate(bytes)) {}
  Memory(Memory&& other) noexcept
      : device_(other.device_), bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (data_) device_->release(data_);
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  Device* device_;
  int64_t bytes_;
  void* data_;
};

/// Normal random numbers with mean 0, the same in every array.
Memory random_array(Device& device, fomoe::DType dtype, int64_t count, double deviation = 1.0);

template <typename T>
Memory copied(Device& device, const std::vector<T>& values) {
  Memory memory(device, static_cast<int64_t>(values.size() * sizeof(T)));
  device.copy(memory.data(), values.data(), memory.bytes());
  return memory;
}

}  // namespace bench
