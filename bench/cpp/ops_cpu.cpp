// SPDX-License-Identifier: Apache-2.0
#include "fomoe/combine.h"
#include "fomoe/permute.h"
#include "fomoe/route.h"
#include "ops.h"

namespace bench {
namespace {

using fomoe::DType;
using fomoe::Gate;
namespace cpu = fomoe::cpu;

class CpuOps : public Ops {
 public:
  explicit CpuOps(Device& device) : device_(device) {}

  Work topk_gate(DType dtype, const Gate& gate, const Sets<GateArrays>& sets) override {
    const auto workspace = workspace_of(cpu::topk_gate_workspace_bytes(dtype, gate));
    return [=](int set) {
      cpu::topk_gate(dtype, gate, sets[set].input, sets[set].result, workspace->data());
    };
  }
  Work topk_gate_backward(DType dtype, const Gate& gate, const Sets<GateArrays>& sets) override {
    return [=](int set) {
      const GateArrays& a = sets[set];
      cpu::topk_gate_backward(dtype, gate, a.input, a.result.ids, a.gradient, a.grad_logits);
    };
  }
  Work route(const Sets<RouteArrays>& sets) override {
    const auto workspace = workspace_of(cpu::route_workspace_bytes(sets.front().num_local_experts));
    return [=](int set) {
      const RouteArrays& a = sets[set];
      cpu::route(a.ids, a.num_slots, a.expert_map, a.num_local_experts, fomoe::kDropless,
                 a.slot_to_row, a.row_to_slot, a.offsets, workspace->data());
    };
  }
  Work permute(DType dtype, const Sets<RowArrays>& sets) override {
    return [=](int set) {
      const RowArrays& a = sets[set];
      cpu::permute(dtype, a.x, a.routing, a.width, a.out_rows);
    };
  }
  Work combine(DType dtype, const Sets<RowArrays>& sets) override {
    return [=](int set) {
      const RowArrays& a = sets[set];
      cpu::combine(dtype, a.rows, a.weights, a.routing, a.width, a.y);
    };
  }
  Work combine_backward(DType dtype, const Sets<RowArrays>& sets) override {
    return [=](int set) {
      const RowArrays& a = sets[set];
      cpu::combine_backward(dtype, a.grad_y, a.rows, a.weights, a.routing, a.width, a.out_rows,
                            a.d_weights);
    };
  }

 private:
  std::shared_ptr<Memory> workspace_of(int64_t bytes) {
    return std::make_shared<Memory>(device_, bytes);
  }

  Device& device_;
};

}  // namespace

std::unique_ptr<Ops> make_cpu_ops(Device& device) { return std::make_unique<CpuOps>(device); }

}  // namespace bench
