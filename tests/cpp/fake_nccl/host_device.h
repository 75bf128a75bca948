// SPDX-License-Identifier: Apache-2.0
// The device of a rank that is a thread: streams of work in host memory.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "comm/nccl/device.h"
#include "fake_nccl/stream.h"

namespace fake {

class HostDevice final : public fomoe::comm::nccl::Device {
 public:
  using Stream = fomoe::comm::nccl::Stream;

  explicit HostDevice(Timeline& timeline) : timeline_(timeline), stream_(timeline) {}

  void make_current() override {}
  Stream stream() override { return &stream_; }

  Scratch scratch(int64_t bytes) override {
    host_.resize(static_cast<size_t>(bytes));
    device_.resize(static_cast<size_t>(bytes));
    return {host_.data(), device_.data()};
  }

  void copy(void* to, const void* from, int64_t bytes, Stream stream) override {
    of(stream).enqueue([=] {
      std::memcpy(to, from, static_cast<size_t>(bytes));
      return true;
    });
  }

  Event record(Stream stream) override {
    auto* const event =
        new std::shared_ptr<std::atomic<bool>>(std::make_shared<std::atomic<bool>>(false));
    of(stream).enqueue([passed = *event] { return passed->store(true), true; });
    return event;
  }

  bool has_passed(Event event) override {
    advance(timeline_);
    return flag(event)->load();
  }

  void wait(Stream stream, Event event) override {
    of(stream).enqueue([passed = flag(event)] { return passed->load(); });
  }

  void release(Event event) noexcept override {
    delete static_cast<std::shared_ptr<std::atomic<bool>>*>(event);
  }

 private:
  static StreamOfWork& of(Stream stream) { return *static_cast<StreamOfWork*>(stream); }
  static std::shared_ptr<std::atomic<bool>> flag(Event event) {
    return *static_cast<std::shared_ptr<std::atomic<bool>>*>(event);
  }

  Timeline& timeline_;
  StreamOfWork stream_;
  std::vector<char> host_, device_;
};

}  // namespace fake
