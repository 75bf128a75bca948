// SPDX-License-Identifier: Apache-2.0
// expert_mlp: gather, first product, activation, second product and combine, expert by expert.
//
//   pre[r] = x[token of r] w1[e]^T + b1[e]
//   hidden[r] = act(pre[r])
//   out[r] = hidden[r] w2[e]^T + b2[e]
//   y[t] = sum_k weights[t, k] * out[slot_to_row[t, k]]
//
// where gate = first F columns of pre and up = last F:
//   swiglu:         act = silu(gate) * up
//   silu:           act = silu(pre)
//   swiglu_clamped: act = g * sigmoid(kClampedSlope g) * (u + 1)          (gpt-oss)
//                   g = min(gate, kClampedLimit), u = max(min(up, kClampedLimit), -kClampedLimit)
//
// pre, hidden, out and y are each rounded once. The backward needs x and pre only. With
// d_hidden[r] = grad_y[t] w2[e] (without the weight), d_weights[slot] = <d_hidden[r], hidden[r]> +
// <grad_y[t], b2[e]>, so that no expert output is saved. Gathered rows and hidden rows live in a
// workspace of one expert.
#pragma once

#include "fomoe/cuda.h"
#include "fomoe/gemm.h"
#include "fomoe/kernel_path.h"
#include "fomoe/routing.h"

namespace fomoe {

enum class Activation : int32_t { kSwiglu = 0, kSilu = 1, kSwigluClamped = 2 };

inline constexpr bool is_gated(Activation activation) { return activation != Activation::kSilu; }

inline constexpr double kClampedLimit = 7.0;
inline constexpr double kClampedSlope = 1.702;

struct ExpertMlp {
  Activation activation;
  ExpertMatrices w1;  // [E_local, P, D]: P = 2F if gated (gate rows, then up rows), else F
  ExpertMatrices w2;  // [E_local, D, F]
  const void* b1;     // [E_local, P], dense, of the type of w1, or nullptr
  const void* b2;     // [E_local, D], likewise
  Routing routing;

  DType dtype() const { return w1.dtype; }
  int64_t dim() const { return w2.rows; }         // D
  int64_t expert_dim() const { return w2.cols; }  // F
  int64_t pre_dim() const { return w1.rows; }     // P
};

/// Where the backward writes, dense. nullptr for x, for w1 and w2 together, and for b1 and b2
/// together: not wanted, not computed.
struct ExpertMlpGradient {
  void* x;        // [T, D]
  void* weights;  // [T, K], accumulation type
  void* w1;       // [E_local, P, D]
  void* w2;       // [E_local, D, F]
  void* b1;       // [E_local, P]
  void* b2;       // [E_local, D]
};

namespace cpu {
/// Reads the offsets: only rows that are executed take room. D and F are positive.
int64_t expert_mlp_workspace_bytes(const ExpertMlp& mlp);
int64_t expert_mlp_backward_workspace_bytes(const ExpertMlp& mlp);

/// x [T, D], y [T, D], pre [R, P] (zero past the last executed row; nullptr if no backward
/// follows), dense, of type mlp.dtype(); weights [T, K] of its accumulation type.
void expert_mlp(const ExpertMlp& mlp, const void* x, const void* weights, const Gemm& gemm, void* y,
                void* pre, void* workspace);
void expert_mlp_backward(const ExpertMlp& mlp, const void* grad_y, const void* x,
                         const void* weights, const void* pre, const Gemm& gemm,
                         const ExpertMlpGradient& gradient, void* workspace);
}  // namespace cpu

namespace cuda {
/// Do not depend on how many rows are executed.
int64_t expert_mlp_workspace_bytes(KernelPath path, const ExpertMlp& mlp);
int64_t expert_mlp_backward_workspace_bytes(KernelPath path, const ExpertMlp& mlp);

/// As on the CPU, on the matrix kernels of `path`, one that choose_path allows.
void expert_mlp(KernelPath path, const ExpertMlp& mlp, const void* x, const void* weights, void* y,
                void* pre, void* workspace, Stream stream);
void expert_mlp_backward(KernelPath path, const ExpertMlp& mlp, const void* grad_y, const void* x,
                         const void* weights, const void* pre, const ExpertMlpGradient& gradient,
                         void* workspace, Stream stream);
}  // namespace cuda

namespace reference {
/// Every array is double, mlp's weights too; of the gradients only b1 and b2 may be nullptr.
void expert_mlp(const ExpertMlp& mlp, const double* x, const double* weights, double* y,
                double* pre);
void expert_mlp_backward(const ExpertMlp& mlp, const double* grad_y, const double* x,
                         const double* weights, const ExpertMlpGradient& gradient);
}  // namespace reference

}  // namespace fomoe
