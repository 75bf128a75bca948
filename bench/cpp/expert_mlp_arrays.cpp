// SPDX-License-Identifier: Apache-2.0
#include "expert_mlp_arrays.h"

#include <cmath>

namespace bench {
namespace {

using fomoe::DType;

double inverse_root(int64_t width) { return 1 / std::sqrt(static_cast<double>(width)); }

DType sum_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

/// Of the shapes here, only the experts of gpt-oss have biases.
bool has_bias(const Shape& shape) { return shape.activation == fomoe::Activation::kSwigluClamped; }

}  // namespace

ExpertMlpMemory::ExpertMlpMemory(Device& device, const Shape& s, DType dtype, bool trains)
    : shape_(s),
      dtype_(dtype),
      trains_(trains),
      x_(random_array(device, dtype, s.tokens * s.dim)),
      weights_(random_array(device, sum_of(dtype), s.num_rows())),
      w1_(random_array(device, dtype, s.num_experts * s.pre_dim() * s.dim, inverse_root(s.dim))),
      w2_(random_array(device, dtype, s.num_experts * s.dim * s.expert_dim,
                       inverse_root(s.expert_dim))),
      b1_(random_array(device, dtype, has_bias(s) ? s.num_experts * s.pre_dim() : 0)),
      b2_(random_array(device, dtype, has_bias(s) ? s.num_experts * s.dim : 0)),
      y_(device, x_.bytes()),
      grad_y_(random_array(device, dtype, trains ? s.tokens * s.dim : 0)),
      pre_(device, trains ? s.num_rows() * s.pre_dim() * fomoe::size_of(dtype) : 0),
      d_x_(device, trains ? x_.bytes() : 0),
      d_weights_(device, trains ? weights_.bytes() : 0),
      d_w1_(device, trains ? w1_.bytes() : 0),
      d_w2_(device, trains ? w2_.bytes() : 0),
      d_b1_(device, trains ? b1_.bytes() : 0),
      d_b2_(device, trains ? b2_.bytes() : 0) {}

int64_t ExpertMlpMemory::bytes(const Shape& s, DType dtype) {
  const int64_t weights = s.num_experts * s.dim * (s.pre_dim() + s.expert_dim);
  return fomoe::size_of(dtype) * (4 * s.tokens * s.dim + s.num_rows() * s.pre_dim() + 2 * weights);
}

ExpertMlpArrays ExpertMlpMemory::view(const fomoe::Routing& routing) const {
  const int64_t pre = shape_.pre_dim(), dim = shape_.dim, expert_dim = shape_.expert_dim;
  const int64_t experts = routing.num_local_experts;
  const bool bias = has_bias(shape_);
  ExpertMlpArrays arrays = {};
  arrays.mlp.activation = shape_.activation;
  arrays.mlp.w1 = {dtype_, w1_.data(), experts, pre, dim, pre * dim, dim, 1};
  arrays.mlp.w2 = {dtype_, w2_.data(), experts, dim, expert_dim, dim * expert_dim, expert_dim, 1};
  arrays.mlp.b1 = bias ? b1_.data() : nullptr;
  arrays.mlp.b2 = bias ? b2_.data() : nullptr;
  arrays.mlp.routing = routing;
  arrays.x = x_.data();
  arrays.weights = weights_.data();
  arrays.grad_y = grad_y_.data();
  arrays.y = y_.data();
  arrays.pre = trains_ ? pre_.data() : nullptr;
  arrays.gradient = {d_x_.data(),
                     d_weights_.data(),
                     d_w1_.data(),
                     d_w2_.data(),
                     bias ? d_b1_.data() : nullptr,
                     bias ? d_b2_.data() : nullptr};
  return arrays;
}

ExpertTraffic::ExpertTraffic(const Shape& shape, DType dtype, const HostRouting& host)
    : size_(static_cast<double>(fomoe::size_of(dtype))),
      tokens_(static_cast<double>(shape.tokens)),
      rows_(static_cast<double>(host.num_executed_rows())),
      dim_(static_cast<double>(shape.dim)),
      expert_dim_(static_cast<double>(shape.expert_dim)),
      pre_dim_(static_cast<double>(shape.pre_dim())),
      active_(static_cast<double>(host.num_active_experts())),
      local_(static_cast<double>(host.num_local_experts())) {}

double ExpertTraffic::forward(bool saves_pre) const {
  const double weights = active_ * dim_ * (pre_dim_ + expert_dim_);
  const double up = tokens_ * dim_ + rows_ * expert_dim_ + (saves_pre ? rows_ * pre_dim_ : 0);
  const double down = rows_ * (expert_dim_ + dim_);
  const double combine = (rows_ + tokens_) * dim_;
  return size_ * (weights + up + down + combine) + 8 * rows_;
}

double ExpertTraffic::backward() const {
  const double weights = (active_ + local_) * dim_ * (pre_dim_ + expert_dim_);  // read, written
  const double d_hidden = tokens_ * dim_ + rows_ * (2 * pre_dim_ + expert_dim_);
  const double d_rows = rows_ * (pre_dim_ + dim_) + (rows_ + tokens_) * dim_;
  const double weight_gradients =
      rows_ * pre_dim_ + tokens_ * dim_ + rows_ * expert_dim_ + tokens_ * dim_;
  return size_ * (weights + d_hidden + d_rows + weight_gradients) + 8 * rows_;
}

double ExpertTraffic::flops() const { return 2 * rows_ * dim_ * (pre_dim_ + expert_dim_); }

}  // namespace bench
