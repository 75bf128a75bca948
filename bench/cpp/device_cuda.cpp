// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>

#include "arguments.h"
#include "device.h"
#include "device_cpu.h"
#include "device_kernels.h"
#include "fomoe/device.h"
#include "fomoe/kernel_path.h"

namespace bench {
namespace {

constexpr double kGraphMicroseconds = 2000;  // so long that launching the graph does not count
constexpr int kMostCalls = 512;

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  double microseconds_since(const Event& begin) const {
    check(cudaEventSynchronize(event_), "waiting for the kernels");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "cudaEventElapsedTime");
    return 1e3 * milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Evicts what the cache holds.
class Flush {
 public:
  Flush(int64_t cache_bytes, cudaStream_t stream) : bytes_(3 * cache_bytes), stream_(stream) {
    check(cudaMalloc(&zeros_, static_cast<size_t>(bytes_ + 16)), "cudaMalloc for the L2 flush");
    check(cudaMemset(zeros_, 0, static_cast<size_t>(bytes_ + 16)), "cudaMemset");
  }
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;
  ~Flush() { cudaFree(zeros_); }
  void operator()() const {
    launch_read(zeros_, bytes_, reinterpret_cast<int*>(static_cast<char*>(zeros_) + bytes_),
                stream_);
    check(cudaGetLastError(), "flushing the L2 cache");
  }

 private:
  int64_t bytes_;
  cudaStream_t stream_;
  void* zeros_ = nullptr;
};

/// Every run begins with an empty cache if cold, and then uses each set of arrays once at most.
class CudaStopwatch : public Stopwatch {
 public:
  CudaStopwatch(Work work, int num_sets, const TimingOptions& options, const Flush& flush,
                cudaStream_t stream)
      : work_(std::move(work)),
        num_sets_(num_sets),
        cold_(options.cold),
        flush_(flush),
        stream_(stream) {
    run_calls();
    const double once = run();
    const int wanted = static_cast<int>(kGraphMicroseconds / std::max(once, 1.0)) + 1;
    calls_ = std::clamp(wanted, 1, cold_ ? num_sets_ : kMostCalls);
    if (options.graph) capture();
    run();
  }
  CudaStopwatch(const CudaStopwatch&) = delete;
  CudaStopwatch& operator=(const CudaStopwatch&) = delete;
  ~CudaStopwatch() override {
    if (graph_) cudaGraphExecDestroy(graph_);
  }

  double run() override {
    if (cold_) flush_();
    begin_.record(stream_);
    if (graph_) {
      check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    } else {
      run_calls();
    }
    end_.record(stream_);
    return end_.microseconds_since(begin_) / calls_;
  }

  int calls() const override { return calls_; }

 private:
  void run_calls() {
    for (int call = 0; call < calls_; ++call) work_(call % num_sets_);
  }

  void capture() {
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      run_calls();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "capturing a CUDA graph");
    const cudaError_t status = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
  }

  Work work_;
  int num_sets_;
  bool cold_;
  const Flush& flush_;
  cudaStream_t stream_;
  int calls_ = 1;
  cudaGraphExec_t graph_ = nullptr;
  Event begin_, end_;
};

class CudaDevice : public Device {
 public:
  CudaDevice() {
    int device = 0, cache = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    name_ = properties.name;
    check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "L2 cache size");
    cache_bytes_ = cache;
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    flush_ = std::make_unique<Flush>(cache_bytes_, stream_);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() override {
    flush_.reset();
    cudaStreamDestroy(stream_);
  }

  std::string name() const override { return name_; }
  int compute_capability() const override { return fomoe::cuda_compute_capability(); }
  int num_threads() const override { return 0; }
  int64_t cache_bytes() const override { return cache_bytes_; }
  fomoe::cuda::Stream stream() const override { return stream_; }

  void* allocate(int64_t bytes) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))),
          "cudaMalloc of " + std::to_string(bytes) + " bytes");
    return memory;
  }
  void release(void* memory) override { cudaFree(memory); }
  void copy(void* target, const void* source, int64_t bytes) override {
    check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  std::vector<std::pair<std::string, Work>> copies(
      const std::vector<std::pair<void*, const void*>>& target_and_source, int64_t bytes) override {
    const cudaStream_t stream = stream_;
    const Work engine = [=](int set) {
      const auto& [target, source] = target_and_source[static_cast<size_t>(set)];
      check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                            stream),
            "cudaMemcpyAsync");
    };
    const Work kernel = [=](int set) {
      const auto& [target, source] = target_and_source[static_cast<size_t>(set)];
      launch_copy(target, source, bytes, stream);
      check(cudaGetLastError(), "copy kernel");
    };
    return {{"cudaMemcpyAsync", engine}, {"kernel", kernel}};
  }

  std::unique_ptr<Stopwatch> stopwatch(Work work, int num_sets,
                                       const TimingOptions& options) override {
    return std::make_unique<CudaStopwatch>(std::move(work), num_sets, options, *flush_, stream_);
  }

 private:
  std::string name_;
  int64_t cache_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Flush> flush_;
};

}  // namespace

std::unique_ptr<Device> open_device(const std::string& name) {
  if (name == "cpu") return std::make_unique<CpuDevice>();
  if (fomoe::cuda_device_count() == 0) {
    throw UsageError("--device: cuda: no CUDA device, or no driver for it, was found");
  }
  if (fomoe::cuda_compute_capability() < 80) {
    throw UsageError("--device: cuda: expected a card of compute capability 8.0 or above, got " +
                     std::to_string(fomoe::cuda_compute_capability() / 10) + "." +
                     std::to_string(fomoe::cuda_compute_capability() % 10));
  }
  return std::make_unique<CudaDevice>();
}

}  // namespace bench
