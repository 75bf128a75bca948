// SPDX-License-Identifier: Apache-2.0
// A device in host memory: its streams hold work that is tried in order until it is done. The fake
// NCCL and the test put work in; whoever asks whether an event has passed makes the device go on.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace fake {

/// True when it has been done; false to be tried again.
using Work = std::function<bool()>;

struct Timeline {
  std::mutex mutex;
  std::vector<std::deque<Work>*> streams;
};

/// What a cudaStream_t stands for here.
class StreamOfWork {
 public:
  explicit StreamOfWork(Timeline& timeline) : timeline_(timeline) {
    const std::lock_guard lock(timeline_.mutex);
    timeline_.streams.push_back(&work_);
  }

  ~StreamOfWork() {
    const std::lock_guard lock(timeline_.mutex);
    std::erase(timeline_.streams, &work_);
  }

  StreamOfWork(const StreamOfWork&) = delete;
  StreamOfWork& operator=(const StreamOfWork&) = delete;

  void enqueue(Work work) {
    const std::lock_guard lock(timeline_.mutex);
    work_.push_back(std::move(work));
  }

 private:
  Timeline& timeline_;
  std::deque<Work> work_;
};

/// Does what can be done on all streams.
inline void advance(Timeline& timeline) {
  const std::lock_guard lock(timeline.mutex);
  for (bool any = true; any;) {
    any = false;
    for (std::deque<Work>* work : timeline.streams) {
      while (!work->empty() && work->front()()) {
        work->pop_front();
        any = true;
      }
    }
  }
}

}  // namespace fake
