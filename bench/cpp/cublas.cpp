// SPDX-License-Identifier: Apache-2.0
// cuBLAS is opened at run time: neither its headers nor the library are needed to build. The few
// prototypes are those of cublas_api.h, unchanged since CUDA 11.
#include "cublas.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>

#include <stdexcept>

#include "arguments.h"

namespace bench {
namespace {

using Handle = void*;
constexpr int kTransposed = 1, kPlain = 0, kDefaultAlgorithm = -1;
constexpr int kCompute32 = 68, kCompute64 = 70;
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;

struct Functions {
  int (*create)(Handle*);
  int (*destroy)(Handle);
  int (*set_stream)(Handle, cudaStream_t);
  int (*set_workspace)(Handle, void*, size_t);
  int (*gemm)(Handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
              cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb,
              const void* beta, void* c, cudaDataType c_type, int ldc, int compute, int algorithm);
};

void check(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) + ": cuBLAS status " + std::to_string(status));
  }
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw UsageError(std::string("--cublas: the library has no ") + name);
}

cudaDataType type_of(fomoe::DType dtype) {
  switch (dtype) {
    case fomoe::DType::kFloat64:
      return CUDA_R_64F;
    case fomoe::DType::kFloat32:
      return CUDA_R_32F;
    case fomoe::DType::kBFloat16:
      return CUDA_R_16BF;
    case fomoe::DType::kFloat16:
      return CUDA_R_16F;
  }
  return CUDA_R_32F;
}

class Cublas : public DenseLibrary {
 public:
  Cublas(void* library, std::string name, Device& device)
      : name_(std::move(name)), device_(device), workspace_(device, kWorkspaceBytes) {
    find(library, "cublasCreate_v2", functions_.create);
    find(library, "cublasDestroy_v2", functions_.destroy);
    find(library, "cublasSetStream_v2", functions_.set_stream);
    find(library, "cublasSetWorkspace_v2", functions_.set_workspace);
    find(library, "cublasGemmEx", functions_.gemm);
    check(functions_.create(&handle_), "cublasCreate");
    check(functions_.set_stream(handle_, static_cast<cudaStream_t>(device.stream())),
          "cublasSetStream");
    // Its own would be allocated while a graph is captured.
    check(functions_.set_workspace(handle_, workspace_.data(), kWorkspaceBytes),
          "cublasSetWorkspace");
  }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;
  ~Cublas() override { functions_.destroy(handle_); }

  std::string name() const override { return name_; }

  Work products(fomoe::DType dtype, const std::vector<DenseProduct>& products) override {
    struct Operands {
      DenseProduct sizes;
      Memory left, right, out;
    };
    auto operands = std::make_shared<std::vector<Operands>>();
    for (const DenseProduct& p : products) {
      operands->push_back({p, random_array(device_, dtype, p.rows * p.depth),
                           random_array(device_, dtype, p.cols * p.depth),
                           Memory(device_, p.rows * p.cols * fomoe::size_of(dtype))});
    }
    return [this, dtype, operands](int) {
      for (const Operands& o : *operands) {
        multiply(dtype, o.sizes, o.left.data(), o.right.data(), o.out.data());
      }
    };
  }

 private:
  /// cuBLAS counts along columns: out transposed = right times left transposed.
  void multiply(fomoe::DType dtype, const DenseProduct& p, const void* left, const void* right,
                void* out) const {
    const double one64 = 1, zero64 = 0;
    const float one32 = 1, zero32 = 0;
    const bool wide = dtype == fomoe::DType::kFloat64;
    const void* one = wide ? static_cast<const void*>(&one64) : &one32;
    const void* zero = wide ? static_cast<const void*>(&zero64) : &zero32;
    const auto rows = static_cast<int>(p.rows), cols = static_cast<int>(p.cols);
    const auto depth = static_cast<int>(p.depth);
    const cudaDataType type = type_of(dtype);
    check(functions_.gemm(handle_, kTransposed, kPlain, cols, rows, depth, one, right, type, depth,
                          left, type, depth, zero, out, type, cols, wide ? kCompute64 : kCompute32,
                          kDefaultAlgorithm),
          "cublasGemmEx");
  }

  std::string name_;
  Device& device_;
  Memory workspace_;
  Functions functions_{};
  Handle handle_ = nullptr;
};

}  // namespace

std::unique_ptr<DenseLibrary> open_cublas(const std::string& file, Device& device) {
  if (device.compute_capability() == 0) return nullptr;
  if (!file.empty()) {
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw UsageError("--cublas: cannot open " + file + ": " + dlerror());
    return std::make_unique<Cublas>(library, file, device);
  }
  for (const std::string folder : {"", FOMOE_CUDA_LIBRARIES "/"}) {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
      if (void* library = dlopen((folder + name).c_str(), RTLD_NOW | RTLD_LOCAL)) {
        return std::make_unique<Cublas>(library, name, device);
      }
    }
  }
  return nullptr;
}

}  // namespace bench
