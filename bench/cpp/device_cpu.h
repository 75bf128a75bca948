// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>

#include "device.h"

namespace bench {

class CpuDevice : public Device {
 public:
  /// compute_capability: other than 0 where CUDA kernels are emulated.
  explicit CpuDevice(std::string name = "cpu", int compute_capability = 0);

  std::string name() const override { return name_; }
  int compute_capability() const override { return compute_capability_; }
  int num_threads() const override;
  int64_t cache_bytes() const override { return int64_t{64} << 20; }
  fomoe::cuda::Stream stream() const override { return nullptr; }

  void* allocate(int64_t bytes) override;
  void release(void* memory) override;
  void copy(void* target, const void* source, int64_t bytes) override;
  std::vector<std::pair<std::string, Work>> copies(
      const std::vector<std::pair<void*, const void*>>& target_and_source, int64_t bytes) override;
  std::unique_ptr<Stopwatch> stopwatch(Work work, int num_sets,
                                       const TimingOptions& options) override;

 private:
  std::string name_;
  int compute_capability_;
};

}  // namespace bench
