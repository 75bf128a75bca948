// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "comm/nccl/device.h"

namespace fomoe::comm::nccl {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // must not become the error of somebody else's launch
  throw std::runtime_error(std::string("CUDA said: ") + cudaGetErrorString(status));
}

class CudaDevice final : public Device {
 public:
  CudaDevice() {
    check(cudaGetDevice(&index_));
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }

  ~CudaDevice() override {
    cudaFree(scratch_.device);
    cudaFreeHost(scratch_.host);
    cudaStreamDestroy(stream_);
  }

  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  void make_current() override { check(cudaSetDevice(index_)); }

  Stream stream() override { return stream_; }

  Scratch scratch(int64_t bytes) override {
    if (bytes > capacity_) {
      Scratch larger;
      const int64_t capacity = std::max(2 * bytes, kSmallest);
      check(cudaMallocHost(&larger.host, static_cast<size_t>(capacity)));
      const cudaError_t status = cudaMalloc(&larger.device, static_cast<size_t>(capacity));
      if (status != cudaSuccess) cudaFreeHost(larger.host);
      check(status);
      cudaFree(scratch_.device);
      cudaFreeHost(scratch_.host);
      scratch_ = larger;
      capacity_ = capacity;
    }
    return scratch_;
  }

  void copy(void* to, const void* from, int64_t bytes, Stream stream) override {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, of(stream)));
  }

  Event record(Stream stream) override {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    const cudaError_t status = cudaEventRecord(event, of(stream));
    if (status != cudaSuccess) release(event);
    check(status);
    return event;
  }

  bool has_passed(Event event) override {
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (status == cudaErrorNotReady) return false;
    check(status);
    return true;
  }

  void wait(Stream stream, Event event) override {
    check(cudaStreamWaitEvent(of(stream), static_cast<cudaEvent_t>(event), 0));
  }

  void release(Event event) noexcept override { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }

 private:
  static constexpr int64_t kSmallest = int64_t{1} << 16;

  static cudaStream_t of(Stream stream) { return static_cast<cudaStream_t>(stream); }

  int index_ = 0;
  cudaStream_t stream_ = nullptr;
  Scratch scratch_;
  int64_t capacity_ = 0;
};

}  // namespace

void check_cuda_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw std::runtime_error(
        std::string("NCCL: expected a CUDA device and its driver on this machine, got: ") +
        (status == cudaSuccess ? "no device" : cudaGetErrorString(status)));
  }
}

std::unique_ptr<Device> cuda_device() {
  check_cuda_device();
  return std::make_unique<CudaDevice>();
}

}  // namespace fomoe::comm::nccl
