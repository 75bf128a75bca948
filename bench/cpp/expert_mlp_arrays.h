// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device.h"
#include "ops.h"
#include "routings.h"
#include "shapes.h"

namespace bench {

/// Operands and results of expert_mlp for all E experts of a shape; a routing with fewer uses the
/// first of them.
class ExpertMlpMemory {
 public:
  /// trains: with what the backward reads and writes.
  ExpertMlpMemory(Device& device, const Shape& shape, fomoe::DType dtype, bool trains);

  static int64_t bytes(const Shape& shape, fomoe::DType dtype);
  ExpertMlpArrays view(const fomoe::Routing& routing) const;

 private:
  Shape shape_;
  fomoe::DType dtype_;
  bool trains_;
  Memory x_, weights_, w1_, w2_, b1_, b2_, y_;
  Memory grad_y_, pre_, d_x_, d_weights_, d_w1_, d_w2_, d_b1_, d_b2_;
};

/// Least bytes and FLOPs: the gather, the activation and the combine weights cost no pass of their
/// own, and only experts with rows are read.
class ExpertTraffic {
 public:
  ExpertTraffic(const Shape& shape, fomoe::DType dtype, const HostRouting& host);

  double forward(bool saves_pre) const;
  double backward() const;
  double flops() const;  // of the forward; the backward has twice as many

 private:
  double size_, tokens_, rows_, dim_, expert_dim_, pre_dim_, active_, local_;
};

}  // namespace bench
