// SPDX-License-Identifier: Apache-2.0
// The experts run one after the other, in runs of kRowsPerGemm rows, so that what one step of a run
// writes is still in the cache when the next reads it. The matrix library and the elementwise loops
// use the threads. The two weight gradients take all rows of an expert in one product each: a sum
// of several products would be rounded several times.
#include "fomoe/expert_mlp.h"

#include <algorithm>

#include "activation.h"
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

struct ForwardBuffers {
  ForwardBuffers(const ExpertMlp& mlp, Workspace& workspace) {
    const auto rows = [&](int64_t count, int64_t width) {
      return Rows{workspace.take_bytes(count * width * size_of(mlp.dtype())), mlp.dtype(), width};
    };
    const int64_t run = std::min(kRowsPerGemm, longest_segment(mlp.routing));
    x = rows(run, mlp.dim());
    hidden = rows(run, mlp.expert_dim());
    out = rows(mlp.routing.num_executed_rows(), mlp.dim());
  }

  Rows x, hidden;  // of the current run
  Rows out;        // of all executed rows
};

struct BackwardBuffers {
  BackwardBuffers(const ExpertMlp& mlp, Workspace& workspace) {
    const auto rows = [&](int64_t count, int64_t width) {
      return Rows{workspace.take_bytes(count * width * size_of(mlp.dtype())), mlp.dtype(), width};
    };
    const int64_t segment = longest_segment(mlp.routing);
    x = rows(segment, mlp.dim());
    grad_y = rows(segment, mlp.dim());
    hidden = rows(segment, mlp.expert_dim());
    d_pre = rows(segment, mlp.pre_dim());
    d_x = rows(mlp.routing.num_executed_rows(), mlp.dim());
  }

  Rows x, grad_y, hidden, d_pre;  // of the current expert
  Rows d_x;                       // of all executed rows
};

/// hidden = act(pre) for a run of rows.
void activate(DType dtype, Activation activation, const void* pre, int64_t num_rows,
              int64_t expert_dim, void* hidden) {
  const int64_t pre_dim = expert_dim * (activation == Activation::kSwiglu ? 2 : 1);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(
        num_rows, ceil_div(kElementsPerThread, expert_dim), [&](int64_t begin, int64_t end) {
          activate_rows(activation, static_cast<const T*>(pre) + begin * pre_dim, end - begin,
                        expert_dim, static_cast<T*>(hidden) + begin * expert_dim);
        });
  });
}

/// d_hidden -> weight * hidden in place, d_pre, and the weights' gradients, for a run of rows.
void activate_backward(const ExpertMlp& mlp, const void* weights, const void* pre, int64_t first,
                       int64_t count, void* hidden, void* d_pre, void* d_weights) {
  dispatch(mlp.dtype(), [&](auto element) {
    using T = decltype(element);
    using Real = Accumulate<T>;
    const int64_t expert_dim = mlp.expert_dim(), pre_dim = mlp.pre_dim();
    parallel_for(count, ceil_div(kElementsPerThread, expert_dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t slot = mlp.routing.row_to_slot[first + row];
        static_cast<Real*>(d_weights)[slot] = activate_row_backward(
            mlp.activation, static_cast<const T*>(pre) + row * pre_dim,
            static_cast<const Real*>(weights)[slot], expert_dim,
            static_cast<T*>(hidden) + row * expert_dim, static_cast<T*>(d_pre) + row * pre_dim);
      }
    });
  });
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
  const Rows pre_rows = {pre, dtype, mlp.pre_dim()};
  const ExpertMatrices w1_transposed = mlp.w1.transposed(), w2_transposed = mlp.w2.transposed();

  for (int64_t expert = 0; expert < mlp.routing.num_local_experts; ++expert) {
    for_each_run(mlp.routing, expert, [&](int64_t row, int64_t count) {
      const DenseMatrix run_x = buffers.x.run(0, count), run_hidden = buffers.hidden.run(0, count);
      permute_range(dtype, x, mlp.routing, mlp.dim(), row, count, run_x.data);
      gemm(dtype, run_x.view(), w1_transposed[expert], pre_rows.run(row, count));
      activate(dtype, mlp.activation, pre_rows.at(row), count, mlp.expert_dim(), run_hidden.data);
      gemm(dtype, run_hidden.view(), w2_transposed[expert], buffers.out.run(row, count));
    });
  }
  const int64_t executed = mlp.routing.num_executed_rows();
  pre_rows.fill_zero(executed, mlp.routing.num_rows() - executed);
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
      d_w1.fill_zero(expert, 1);
      d_w2.fill_zero(expert, 1);
      continue;
    }
    for_each_run(routing, expert, [&](int64_t row, int64_t count) {
      const int64_t local = row - segment;
      const DenseMatrix run_grad_y = buffers.grad_y.run(local, count);
      const DenseMatrix run_hidden = buffers.hidden.run(local, count);
      const DenseMatrix run_d_pre = buffers.d_pre.run(local, count);
      permute_range(dtype, x, routing, dim, row, count, buffers.x.at(local));
      permute_range(dtype, grad_y, routing, dim, row, count, run_grad_y.data);
      gemm(dtype, run_grad_y.view(), mlp.w2[expert], run_hidden);
      activate_backward(mlp, weights, pre_rows.at(row), row, count, run_hidden.data, run_d_pre.data,
                        gradient.weights);
      gemm(dtype, run_d_pre.view(), mlp.w1[expert], buffers.d_x.run(row, count));
    });
    gemm(dtype, buffers.grad_y.run(0, rows).view().transposed(), buffers.hidden.run(0, rows).view(),
         {d_w2.at(expert), dim, expert_dim});
    gemm(dtype, buffers.d_pre.run(0, rows).view().transposed(), buffers.x.run(0, rows).view(),
         {d_w1.at(expert), pre_dim, dim});
  }
  combine(dtype, buffers.d_x.data, nullptr, routing, dim, gradient.x);
}

}  // namespace fomoe::cpu
