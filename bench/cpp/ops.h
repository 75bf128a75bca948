// SPDX-License-Identifier: Apache-2.0
// The ops as work to time, on the CPU or in CUDA. Arrays and tables live in the device's memory;
// each function prepares what a call needs and keeps it as long as the work lives.
#pragma once

#include <memory>
#include <vector>

#include "device.h"
#include "fomoe/expert_mlp.h"
#include "fomoe/grouped_gemm.h"
#include "fomoe/topk_gate.h"

namespace bench {

struct GateArrays {
  fomoe::GateInput input;
  fomoe::GateResult result;
  fomoe::GateGradient gradient;
  void* grad_logits;
};

struct RouteArrays {
  const int32_t* ids;         // [T, K]
  const int32_t* expert_map;  // [E]
  int64_t num_slots, num_experts, num_local_experts;
  int32_t *slot_to_row, *row_to_slot, *offsets;
};

struct RowArrays {
  fomoe::Routing routing;
  int64_t width;
  const void *x, *rows, *weights, *grad_y;  // read
  void *out_rows, *y, *d_weights;           // written
};

struct RowProductArrays {
  const void* rows;  // [num_rows, b.rows]
  int64_t num_rows;
  fomoe::ExpertMatrices b;
  const int32_t* offsets;
  void* out;  // [num_rows, b.cols]
};

struct WeightProductArrays {
  fomoe::DType dtype;
  const void *left, *right;  // [num_rows, out_rows], [num_rows, out_cols]
  int64_t num_rows;
  const int32_t* offsets;
  int64_t num_local_experts, out_rows, out_cols;
  void* out;
};

struct ExpertMlpArrays {
  fomoe::ExpertMlp mlp;
  const void *x, *weights, *grad_y;
  void *y, *pre;  // the backward reads pre
  fomoe::ExpertMlpGradient gradient;
};

class Ops {
 public:
  template <typename Arrays>
  using Sets = std::vector<Arrays>;

  virtual ~Ops() = default;
  virtual Work topk_gate(fomoe::DType dtype, const fomoe::Gate& gate,
                         const Sets<GateArrays>& sets) = 0;
  virtual Work topk_gate_backward(fomoe::DType dtype, const fomoe::Gate& gate,
                                  const Sets<GateArrays>& sets) = 0;
  virtual Work route(const Sets<RouteArrays>& sets) = 0;
  virtual Work permute(fomoe::DType dtype, const Sets<RowArrays>& sets) = 0;
  virtual Work combine(fomoe::DType dtype, const Sets<RowArrays>& sets) = 0;
  virtual Work combine_backward(fomoe::DType dtype, const Sets<RowArrays>& sets) = 0;
};

/// Ops that are matrix products, of GPUs only: on the CPU these are torch's.
class ProductOps {
 public:
  template <typename Arrays>
  using Sets = std::vector<Arrays>;

  virtual ~ProductOps() = default;
  virtual Work grouped_gemm(fomoe::KernelPath path, const Sets<RowProductArrays>& sets) = 0;
  virtual Work grouped_gemm_wgrad(fomoe::KernelPath path,
                                  const Sets<WeightProductArrays>& sets) = 0;
  virtual Work expert_mlp(fomoe::KernelPath path, const Sets<ExpertMlpArrays>& sets) = 0;
  virtual Work expert_mlp_backward(fomoe::KernelPath path, const Sets<ExpertMlpArrays>& sets) = 0;
};

std::unique_ptr<Ops> make_cpu_ops(Device& device);
std::unique_ptr<Ops> make_cuda_ops(Device& device);
std::unique_ptr<ProductOps> make_cuda_product_ops(Device& device);

}  // namespace bench
