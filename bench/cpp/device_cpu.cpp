// SPDX-License-Identifier: Apache-2.0
#include "device_cpu.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "fomoe/parallel.h"

namespace bench {
namespace {

constexpr int64_t kFlushBytes = int64_t{256} << 20;  // more than any cache
constexpr int64_t kPage = 4096;

class CpuStopwatch : public Stopwatch {
 public:
  CpuStopwatch(Work work, int num_sets, bool cold)
      : work_(std::move(work)), num_sets_(num_sets), cold_(cold) {
    for (int set = 0; set < num_sets_; ++set) work_(set);  // touches every page
  }

  double run() override {
    using Clock = std::chrono::steady_clock;
    if (cold_) flush_caches();
    const int set = next_++ % num_sets_;
    const auto begin = Clock::now();
    work_(set);
    return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
  }

  int calls() const override { return 1; }

 private:
  static void flush_caches() {
    static std::vector<char> buffer(kFlushBytes);
    static char value = 0;
    std::fill(buffer.begin(), buffer.end(), ++value);
  }

  Work work_;
  int num_sets_;
  bool cold_;
  int next_ = 0;
};

}  // namespace

CpuDevice::CpuDevice(std::string name, int compute_capability)
    : name_(std::move(name)), compute_capability_(compute_capability) {}

int CpuDevice::num_threads() const {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void* CpuDevice::allocate(int64_t bytes) {
  void* memory = nullptr;
  const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  if (posix_memalign(&memory, 256, size) != 0) throw std::bad_alloc();
  return memory;
}

void CpuDevice::release(void* memory) { std::free(memory); }

void CpuDevice::copy(void* target, const void* source, int64_t bytes) {
  if (bytes > 0) std::memcpy(target, source, static_cast<size_t>(bytes));
}

std::vector<std::pair<std::string, Work>> CpuDevice::copies(
    const std::vector<std::pair<void*, const void*>>& target_and_source, int64_t bytes) {
  const Work work = [target_and_source, bytes](int set) {
    const auto& [target, source] = target_and_source[static_cast<size_t>(set)];
    fomoe::parallel_for(bytes, kPage, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(target) + begin, static_cast<const char*>(source) + begin,
                  static_cast<size_t>(end - begin));
    });
  };
  return {{"memcpy", work}};
}

std::unique_ptr<Stopwatch> CpuDevice::stopwatch(Work work, int num_sets,
                                                const TimingOptions& options) {
  return std::make_unique<CpuStopwatch>(std::move(work), num_sets, options.cold);
}

}  // namespace bench
