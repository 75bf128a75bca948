// SPDX-License-Identifier: Apache-2.0
// Slot by slot, each as if it were the only one.
#include <algorithm>
#include <cmath>
#include <vector>

#include "fomoe/expert_mlp.h"

namespace fomoe::reference {
namespace {

using Vector = std::vector<double>;

/// matrix times vector.
Vector product(const Matrix& matrix, const Vector& vector) {
  const double* data = static_cast<const double*>(matrix.data);
  Vector result(matrix.rows, 0.0);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    for (int64_t j = 0; j < matrix.cols; ++j) {
      result[i] += data[i * matrix.row_stride + j * matrix.col_stride] * vector[j];
    }
  }
  return result;
}

void add_outer_product(const Vector& column, const Vector& row, double* matrix) {
  for (double a : column) {
    for (double b : row) *matrix++ += a * b;
  }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// matrix times vector plus one expert's row of biases, unless those are nullptr.
Vector affine(const Matrix& matrix, const Vector& vector, const void* biases, int64_t expert) {
  Vector result = product(matrix, vector);
  if (biases) {
    const double* bias = static_cast<const double*>(biases) + expert * matrix.rows;
    for (int64_t i = 0; i < matrix.rows; ++i) result[i] += bias[i];
  }
  return result;
}

Vector hidden_of(const ExpertMlp& mlp, const Vector& pre) {
  const int64_t expert_dim = mlp.expert_dim();
  Vector hidden(expert_dim);
  for (int64_t f = 0; f < expert_dim; ++f) {
    if (mlp.activation == Activation::kSwigluClamped) {
      const double gate = std::min(pre[f], kClampedLimit);
      const double up = std::clamp(pre[expert_dim + f], -kClampedLimit, kClampedLimit);
      hidden[f] = gate * sigmoid(kClampedSlope * gate) * (up + 1);
    } else {
      hidden[f] = pre[f] * sigmoid(pre[f]);
      if (mlp.activation == Activation::kSwiglu) hidden[f] *= pre[expert_dim + f];
    }
  }
  return hidden;
}

Vector pre_gradient(const ExpertMlp& mlp, const Vector& pre, const Vector& d_hidden) {
  const int64_t expert_dim = mlp.expert_dim();
  Vector d_pre(pre.size());
  for (int64_t f = 0; f < expert_dim; ++f) {
    if (mlp.activation == Activation::kSwigluClamped) {
      const double gate = std::min(pre[f], kClampedLimit), up = pre[expert_dim + f];
      const double s = sigmoid(kClampedSlope * gate);
      const double clamped_up = std::clamp(up, -kClampedLimit, kClampedLimit);
      const double slope = s + kClampedSlope * gate * s * (1 - s);
      d_pre[f] = pre[f] > kClampedLimit ? 0 : d_hidden[f] * slope * (clamped_up + 1);
      d_pre[expert_dim + f] = up == clamped_up ? d_hidden[f] * gate * s : 0;
      continue;
    }
    const double s = sigmoid(pre[f]), slope = s + pre[f] * s * (1 - s);
    if (mlp.activation == Activation::kSwiglu) {
      d_pre[f] = d_hidden[f] * slope * pre[expert_dim + f];
      d_pre[expert_dim + f] = d_hidden[f] * pre[f] * s;
    } else {
      d_pre[f] = d_hidden[f] * slope;
    }
  }
  return d_pre;
}

int64_t expert_of(const Routing& routing, int64_t row) {
  int64_t expert = 0;
  while (routing.offsets[expert + 1] <= row) ++expert;
  return expert;
}

Vector token(const double* values, int64_t t, int64_t width) {
  return Vector(values + t * width, values + (t + 1) * width);
}

}  // namespace

void expert_mlp(const ExpertMlp& mlp, const double* x, const double* weights, double* y,
                double* pre) {
  const Routing& routing = mlp.routing;
  std::fill_n(y, routing.num_tokens * mlp.dim(), 0.0);
  std::fill_n(pre, routing.num_rows() * mlp.pre_dim(), 0.0);
  for (int64_t slot = 0; slot < routing.num_rows(); ++slot) {
    const int64_t row = routing.slot_to_row[slot], t = slot / routing.top_k;
    if (row < 0) continue;
    const int64_t expert = expert_of(routing, row);
    const Vector row_pre = affine(mlp.w1[expert], token(x, t, mlp.dim()), mlp.b1, expert);
    const Vector out = affine(mlp.w2[expert], hidden_of(mlp, row_pre), mlp.b2, expert);
    std::copy(row_pre.begin(), row_pre.end(), pre + row * mlp.pre_dim());
    for (int64_t d = 0; d < mlp.dim(); ++d) y[t * mlp.dim() + d] += weights[slot] * out[d];
  }
}

void expert_mlp_backward(const ExpertMlp& mlp, const double* grad_y, const double* x,
                         const double* weights, const ExpertMlpGradient& gradient) {
  const Routing& routing = mlp.routing;
  const int64_t dim = mlp.dim(), w1_size = mlp.pre_dim() * dim, w2_size = dim * mlp.expert_dim();
  double* d_x = static_cast<double*>(gradient.x);
  double* d_weights = static_cast<double*>(gradient.weights);
  double* d_w1 = static_cast<double*>(gradient.w1);
  double* d_w2 = static_cast<double*>(gradient.w2);
  double* d_b1 = static_cast<double*>(gradient.b1);
  double* d_b2 = static_cast<double*>(gradient.b2);
  std::fill_n(d_x, routing.num_tokens * dim, 0.0);
  std::fill_n(d_weights, routing.num_rows(), 0.0);
  std::fill_n(d_w1, routing.num_local_experts * w1_size, 0.0);
  std::fill_n(d_w2, routing.num_local_experts * w2_size, 0.0);
  if (d_b1) std::fill_n(d_b1, routing.num_local_experts * mlp.pre_dim(), 0.0);
  if (d_b2) std::fill_n(d_b2, routing.num_local_experts * dim, 0.0);
  for (int64_t slot = 0; slot < routing.num_rows(); ++slot) {
    const int64_t row = routing.slot_to_row[slot], t = slot / routing.top_k;
    if (row < 0) continue;
    const int64_t expert = expert_of(routing, row);
    const Vector x_t = token(x, t, dim), grad = token(grad_y, t, dim);
    const Vector pre = affine(mlp.w1[expert], x_t, mlp.b1, expert), hidden = hidden_of(mlp, pre);
    const Vector out = affine(mlp.w2[expert], hidden, mlp.b2, expert);
    Vector d_out = grad;
    for (int64_t d = 0; d < dim; ++d) {
      d_weights[slot] += grad[d] * out[d];
      d_out[d] *= weights[slot];
    }
    const Vector d_pre = pre_gradient(mlp, pre, product(mlp.w2[expert].transposed(), d_out));
    const Vector d_token = product(mlp.w1[expert].transposed(), d_pre);
    for (int64_t d = 0; d < dim; ++d) d_x[t * dim + d] += d_token[d];
    add_outer_product(d_out, hidden, d_w2 + expert * w2_size);
    add_outer_product(d_pre, x_t, d_w1 + expert * w1_size);
    if (d_b1) add_outer_product(d_pre, {1.0}, d_b1 + expert * mlp.pre_dim());
    if (d_b2) add_outer_product(d_out, {1.0}, d_b2 + expert * dim);
  }
}

}  // namespace fomoe::reference
