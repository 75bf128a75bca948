// SPDX-License-Identifier: Apache-2.0
// The experts run one after the other, in runs of kRowsPerGemm rows, so that what one step of a run
// writes is still in the cache when the next reads it. The matrix library and the elementwise loops
// use the threads. The two weight gradients take all rows of an expert in one product each: a sum
// of several products would be rounded several times.
#include "fomoe/expert_mlp.h"

#include <algorithm>

#include "activation.h"
#include "bias.h"
#include "fomoe/combine.h"
#include "fomoe/grouped_gemm.h"
#include "fomoe/parallel.h"
#include "fomoe/permute.h"
#include "fomoe/rows.h"
#include "fomoe/workspace.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kElementsPerThread = 8192;

int64_t longest_segment(const Routing& routing) {
  int64_t longest = 0;
  for (int64_t expert = 0; expert < routing.num_local_experts; ++expert) {
    longest = std::max<int64_t>(longest, routing.offsets[expert + 1] - routing.offsets[expert]);
  }
  return longest;
}

/// Calls function(first_row, count) for the runs of an expert.
template <typename Function>
void for_each_run(const Routing& routing, int64_t expert, const Function& function) {
  const int64_t end = routing.offsets[expert + 1];
  for (int64_t row = routing.offsets[expert]; row < end; row += kRowsPerGemm) {
    function(row, std::min(kRowsPerGemm, end - row));
  }
}

/// Rows of the layer's dtype in a workspace.
Rows take_rows(const ExpertMlp& mlp, Workspace& workspace, int64_t count, int64_t width) {
  return {workspace.take_bytes(count * width * size_of(mlp.dtype())), mlp.dtype(), width};
}

struct ForwardBuffers {
  ForwardBuffers(const ExpertMlp& mlp, Workspace& workspace) {
    const int64_t run = std::min(kRowsPerGemm, longest_segment(mlp.routing));
    x = take_rows(mlp, workspace, run, mlp.dim());
    pre = take_rows(mlp, workspace, run, mlp.pre_dim());
    hidden = take_rows(mlp, workspace, run, mlp.expert_dim());
    out = take_rows(mlp, workspace, mlp.routing.num_executed_rows(), mlp.dim());
  }

  Rows x, pre, hidden;  // of the current run
  Rows out;             // of all executed rows
};

struct BackwardBuffers {
  BackwardBuffers(const ExpertMlp& mlp, Workspace& workspace) {
    const int64_t segment = longest_segment(mlp.routing);
    x = take_rows(mlp, workspace, segment, mlp.dim());
    grad_y = take_rows(mlp, workspace, segment, mlp.dim());
    hidden = take_rows(mlp, workspace, segment, mlp.expert_dim());
    d_pre = take_rows(mlp, workspace, segment, mlp.pre_dim());
    d_x = take_rows(mlp, workspace, mlp.routing.num_executed_rows(), mlp.dim());
  }

  Rows x, grad_y, hidden, d_pre;  // of the current expert
  Rows d_x;                       // of all executed rows
};

/// One expert's bias, or nullptr.
const void* bias_of(const void* biases, DType dtype, int64_t width, int64_t expert) {
  return biases ? ConstRows{biases, dtype, width}.at(expert) : nullptr;
}

/// hidden = act(pre) for a run of rows.
void activate(const ExpertMlp& mlp, const void* pre, int64_t num_rows, void* hidden) {
  const int64_t expert_dim = mlp.expert_dim(), pre_dim = mlp.pre_dim();
  dispatch(mlp.dtype(), [&](auto element) {
    using T = decltype(element);
    dispatch(mlp.activation, [&](auto activation) {
      parallel_for(
          num_rows, ceil_div(kElementsPerThread, expert_dim), [&](int64_t begin, int64_t end) {
            activate_rows<activation>(static_cast<const T*>(pre) + begin * pre_dim, end - begin,
                                      expert_dim, static_cast<T*>(hidden) + begin * expert_dim);
          });
    });
  });
}

/// d_hidden -> weight * hidden in place, d_pre, and the weights' gradients, for a run of rows.
void activate_backward(const ExpertMlp& mlp, const void* weights, const void* pre, int64_t first,
                       int64_t count, void* hidden, void* d_pre, void* d_weights) {
  const int64_t expert_dim = mlp.expert_dim(), pre_dim = mlp.pre_dim();
  dispatch(mlp.dtype(), [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    dispatch(mlp.activation, [&](auto activation) {
      parallel_for(count, ceil_div(kElementsPerThread, expert_dim),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       const int64_t slot = mlp.routing.row_to_slot[first + row];
                       static_cast<Real*>(d_weights)[slot] = activate_row_backward<activation>(
                           static_cast<const T*>(pre) + row * pre_dim,
                           static_cast<const Real*>(weights)[slot], expert_dim,
                           static_cast<T*>(hidden) + row * expert_dim,
                           static_cast<T*>(d_pre) + row * pre_dim);
                     }
                   });
    });
  });
}

/// Gradients of one expert's biases, and what b2 adds to its weights' gradients.
void bias_gradient(const ExpertMlp& mlp, int64_t expert, const void* weights, const void* grad_y,
                   const void* d_pre, const ExpertMlpGradient& gradient) {
  const Routing& routing = mlp.routing;
  const int64_t first = routing.offsets[expert], rows = routing.offsets[expert + 1] - first;
  dispatch(mlp.dtype(), [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    const int32_t* slots = routing.row_to_slot + first;
    const T* grad = static_cast<const T*>(grad_y);
    if (mlp.b2) {
      add_bias_to_weights(static_cast<const T*>(mlp.b2) + expert * mlp.dim(), grad, slots, rows,
                          mlp.dim(), static_cast<Real*>(gradient.weights));
    }
    if (gradient.b1) {
      const Real* no_weights = nullptr;
      sum_rows(static_cast<const T*>(d_pre), no_weights, slots, rows, mlp.pre_dim(),
               static_cast<T*>(gradient.b1) + expert * mlp.pre_dim());
    }
    if (gradient.b2) {
      sum_rows(grad, static_cast<const Real*>(weights), slots, rows, mlp.dim(),
               static_cast<T*>(gradient.b2) + expert * mlp.dim());
    }
  });
}

void fill_zero_gradient(const ExpertMlp& mlp, int64_t expert, const ExpertMlpGradient& gradient) {
  const int64_t dim = mlp.dim(), pre_dim = mlp.pre_dim();
  const auto fill = [&](void* data, int64_t width) {
    if (data) Rows{data, mlp.dtype(), width}.fill_zero(expert, 1);
  };
  fill(gradient.w1, pre_dim * dim);
  fill(gradient.w2, dim * mlp.expert_dim());
  fill(gradient.b1, pre_dim);
  fill(gradient.b2, dim);
}

}  // namespace

int64_t expert_mlp_workspace_bytes(const ExpertMlp& mlp) {
  Workspace workspace(nullptr);
  const ForwardBuffers buffers(mlp, workspace);
  return workspace.bytes();
}

int64_t expert_mlp_backward_workspace_bytes(const ExpertMlp& mlp) {
  Workspace workspace(nullptr);
  const BackwardBuffers buffers(mlp, workspace);
  return workspace.bytes();
}

void expert_mlp(const ExpertMlp& mlp, const void* x, const void* weights, const Gemm& gemm, void* y,
                void* pre, void* workspace) {
  const DType dtype = mlp.dtype();
  Workspace memory(workspace);
  const ForwardBuffers buffers(mlp, memory);
  const Rows all_pre = {pre, dtype, mlp.pre_dim()};
  const ExpertMatrices w1_transposed = mlp.w1.transposed(), w2_transposed = mlp.w2.transposed();

  for (int64_t expert = 0; expert < mlp.routing.num_local_experts; ++expert) {
    const void* b1 = bias_of(mlp.b1, dtype, mlp.pre_dim(), expert);
    const void* b2 = bias_of(mlp.b2, dtype, mlp.dim(), expert);
    for_each_run(mlp.routing, expert, [&](int64_t row, int64_t count) {
      const DenseMatrix run_x = buffers.x.run(0, count), run_hidden = buffers.hidden.run(0, count);
      const DenseMatrix run_pre = pre ? all_pre.run(row, count) : buffers.pre.run(0, count);
      permute_range(dtype, x, mlp.routing, mlp.dim(), row, count, run_x.data);
      multiply(gemm, dtype, run_x.view(), w1_transposed[expert], b1, run_pre);
      activate(mlp, run_pre.data, count, run_hidden.data);
      multiply(gemm, dtype, run_hidden.view(), w2_transposed[expert], b2,
               buffers.out.run(row, count));
    });
  }
  const int64_t executed = mlp.routing.num_executed_rows();
  if (pre) all_pre.fill_zero(executed, mlp.routing.num_rows() - executed);
  combine(dtype, buffers.out.data, weights, mlp.routing, mlp.dim(), y);
}

void expert_mlp_backward(const ExpertMlp& mlp, const void* grad_y, const void* x,
                         const void* weights, const void* pre, const Gemm& gemm,
                         const ExpertMlpGradient& gradient, void* workspace) {
  const DType dtype = mlp.dtype();
  const Routing& routing = mlp.routing;
  const int64_t dim = mlp.dim(), expert_dim = mlp.expert_dim(), pre_dim = mlp.pre_dim();
  Workspace memory(workspace);
  const BackwardBuffers buffers(mlp, memory);
  const ConstRows pre_rows = {pre, dtype, pre_dim};
  const Rows d_w1 = {gradient.w1, dtype, pre_dim * dim};
  const Rows d_w2 = {gradient.w2, dtype, dim * expert_dim};
  // Skipped slots have no row that would write their weight's gradient.
  Rows{gradient.weights, dtype == DType::kFloat64 ? dtype : DType::kFloat32, 1}.fill_zero(
      0, routing.num_rows());

  for (int64_t expert = 0; expert < routing.num_local_experts; ++expert) {
    const int64_t segment = routing.offsets[expert];
    const int64_t rows = routing.offsets[expert + 1] - segment;
    if (rows == 0) {
      fill_zero_gradient(mlp, expert, gradient);
      continue;
    }
    for_each_run(routing, expert, [&](int64_t row, int64_t count) {
      const int64_t local = row - segment;
      const DenseMatrix run_grad_y = buffers.grad_y.run(local, count);
      const DenseMatrix run_hidden = buffers.hidden.run(local, count);
      const DenseMatrix run_d_pre = buffers.d_pre.run(local, count);
      permute_range(dtype, grad_y, routing, dim, row, count, run_grad_y.data);
      multiply(gemm, dtype, run_grad_y.view(), mlp.w2[expert], nullptr, run_hidden);
      activate_backward(mlp, weights, pre_rows.at(row), row, count, run_hidden.data, run_d_pre.data,
                        gradient.weights);
      if (gradient.x) {
        multiply(gemm, dtype, run_d_pre.view(), mlp.w1[expert], nullptr,
                 buffers.d_x.run(row, count));
      }
    });
    bias_gradient(mlp, expert, weights, buffers.grad_y.data, buffers.d_pre.data, gradient);
    if (!gradient.w1) continue;
    permute_range(dtype, x, routing, dim, segment, rows, buffers.x.data);
    multiply(gemm, dtype, buffers.grad_y.run(0, rows).view().transposed(),
             buffers.hidden.run(0, rows).view(), nullptr, {d_w2.at(expert), dim, expert_dim});
    multiply(gemm, dtype, buffers.d_pre.run(0, rows).view().transposed(),
             buffers.x.run(0, rows).view(), nullptr, {d_w1.at(expert), pre_dim, dim});
  }
  if (gradient.x) combine(dtype, buffers.d_x.data, nullptr, routing, dim, gradient.x);
}

}  // namespace fomoe::cpu
