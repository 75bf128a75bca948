// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "fomoe/combine.h"
#include "fomoe/permute.h"
#include "fomoe/route.h"
#include "ops.h"

namespace bench {
namespace {

using fomoe::DType;
using fomoe::Gate;
using fomoe::KernelPath;
namespace cuda = fomoe::cuda;

class CudaOps : public Ops {
 public:
  explicit CudaOps(Device& device) : device_(device), stream_(device.stream()) {}

  Work topk_gate(DType dtype, const Gate& gate, const Sets<GateArrays>& sets) override {
    const auto workspace = workspace_of(cuda::topk_gate_workspace_bytes(dtype, gate));
    return [=, stream = stream_](int set) {
      cuda::topk_gate(dtype, gate, sets[set].input, sets[set].result, workspace->data(), stream);
    };
  }
  Work topk_gate_backward(DType dtype, const Gate& gate, const Sets<GateArrays>& sets) override {
    const auto workspace = workspace_of(cuda::topk_gate_backward_workspace_bytes(dtype, gate));
    return [=, stream = stream_](int set) {
      const GateArrays& a = sets[set];
      cuda::topk_gate_backward(dtype, gate, a.input, a.result.ids, a.gradient, a.grad_logits,
                               workspace->data(), stream);
    };
  }
  Work route(const Sets<RouteArrays>& sets) override {
    const RouteArrays& first = sets.front();
    const auto workspace =
        workspace_of(cuda::route_workspace_bytes(first.num_slots, first.num_local_experts));
    return [=, stream = stream_](int set) {
      const RouteArrays& a = sets[set];
      cuda::route(a.ids, a.num_slots, a.expert_map, a.num_experts, a.num_local_experts,
                  fomoe::kDropless, a.slot_to_row, a.row_to_slot, a.offsets, workspace->data(),
                  stream);
    };
  }
  Work permute(DType dtype, const Sets<RowArrays>& sets) override {
    return [=, stream = stream_](int set) {
      const RowArrays& a = sets[set];
      cuda::permute(dtype, a.x, a.routing, a.width, a.out_rows, stream);
    };
  }
  Work combine(DType dtype, const Sets<RowArrays>& sets) override {
    return [=, stream = stream_](int set) {
      const RowArrays& a = sets[set];
      cuda::combine(dtype, a.rows, a.weights, a.routing, a.width, a.y, stream);
    };
  }
  Work combine_backward(DType dtype, const Sets<RowArrays>& sets) override {
    return [=, stream = stream_](int set) {
      const RowArrays& a = sets[set];
      cuda::combine_backward(dtype, a.grad_y, a.rows, a.weights, a.routing, a.width, a.out_rows,
                             a.d_weights, stream);
    };
  }

 private:
  std::shared_ptr<Memory> workspace_of(int64_t bytes) {
    return std::make_shared<Memory>(device_, bytes);
  }

  Device& device_;
  cuda::Stream stream_;
};

class CudaProductOps : public ProductOps {
 public:
  explicit CudaProductOps(Device& device) : device_(device), stream_(device.stream()) {}

  Work grouped_gemm(KernelPath path, const Sets<RowProductArrays>& sets) override {
    const RowProductArrays& first = sets.front();
    const auto workspace =
        workspace_of(cuda::grouped_gemm_workspace_bytes(first.num_rows, first.b.num_experts));
    return [=, stream = stream_](int set) {
      const RowProductArrays& a = sets[set];
      cuda::grouped_gemm(path, a.rows, a.num_rows, a.b, a.offsets, a.out, workspace->data(),
                         stream);
    };
  }
  Work grouped_gemm_wgrad(KernelPath path, const Sets<WeightProductArrays>& sets) override {
    return [=, stream = stream_](int set) {
      const WeightProductArrays& a = sets[set];
      cuda::grouped_gemm_wgrad(path, a.dtype, a.left, a.right, a.num_rows, a.offsets,
                               a.num_local_experts, a.out_rows, a.out_cols, a.out, stream);
    };
  }
  Work expert_mlp(KernelPath path, const Sets<ExpertMlpArrays>& sets) override {
    int64_t bytes = 0;
    for (const auto& a : sets) {
      bytes = std::max(bytes, cuda::expert_mlp_workspace_bytes(path, a.mlp));
    }
    const auto workspace = workspace_of(bytes);
    return [=, stream = stream_](int set) {
      const ExpertMlpArrays& a = sets[set];
      cuda::expert_mlp(path, a.mlp, a.x, a.weights, a.y, a.pre, workspace->data(), stream);
    };
  }
  Work expert_mlp_backward(KernelPath path, const Sets<ExpertMlpArrays>& sets) override {
    int64_t bytes = 0;
    for (const auto& a : sets) {
      bytes = std::max(bytes, cuda::expert_mlp_backward_workspace_bytes(path, a.mlp));
    }
    const auto workspace = workspace_of(bytes);
    return [=, stream = stream_](int set) {
      const ExpertMlpArrays& a = sets[set];
      cuda::expert_mlp_backward(path, a.mlp, a.grad_y, a.x, a.weights, a.pre, a.gradient,
                                workspace->data(), stream);
    };
  }

 private:
  std::shared_ptr<Memory> workspace_of(int64_t bytes) {
    return std::make_shared<Memory>(device_, bytes);
  }

  Device& device_;
  cuda::Stream stream_;
};

}  // namespace

std::unique_ptr<Ops> make_cuda_ops(Device& device) { return std::make_unique<CudaOps>(device); }

std::unique_ptr<ProductOps> make_cuda_product_ops(Device& device) {
  return std::make_unique<CudaProductOps>(device);
}

}  // namespace bench
