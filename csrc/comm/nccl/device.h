// SPDX-License-Identifier: Apache-2.0
// What the NCCL transport asks of the device that its kernels run on.
#pragma once

#include <cstdint>
#include <memory>

#include "fomoe/cuda.h"

namespace fomoe::comm::nccl {

using Stream = cuda::Stream;

/// A device with streams, events and a stream of our own. Every call returns without waiting for
/// the device, and throws std::runtime_error with what the device said.
class Device {
 public:
  /// A mark in a stream: a cudaEvent_t.
  using Event = void*;

  /// Memory of as many bytes on the host, where the device can copy to and from without the host's
  /// help, and on the device.
  struct Scratch {
    void* host = nullptr;
    void* device = nullptr;
  };

  virtual ~Device() = default;

  /// Makes it the current device of the calling thread.
  virtual void make_current() = 0;

  /// The stream of our own.
  virtual Stream stream() = 0;

  /// The same memory at every call, as long as it suffices.
  virtual Scratch scratch(int64_t bytes) = 0;

  virtual void copy(void* to, const void* from, int64_t bytes, Stream stream) = 0;

  /// A new event behind all that is in the stream.
  virtual Event record(Stream stream) = 0;
  virtual bool has_passed(Event event) = 0;
  /// What comes into the stream from now on begins after the event.
  virtual void wait(Stream stream, Event event) = 0;
  virtual void release(Event event) noexcept = 0;
};

/// Throws std::runtime_error if this build has no CUDA, or the machine no device or no driver.
void check_cuda_device();

/// The current CUDA device. Throws like check_cuda_device.
std::unique_ptr<Device> cuda_device();

}  // namespace fomoe::comm::nccl
