// SPDX-License-Identifier: Apache-2.0
// Forward: two products, then combine; few rows take kernels of their own. Backward: the product
// that gives d_hidden, whose epilogue makes d_pre, weight * hidden and the parts of d_weights of
// it; then what is made of those. x and grad_y are gathered where they are read. Buffers that do
// not live at the same time share memory.
#include <algorithm>

#include "expert_mlp/bias_cuda.h"
#include "expert_mlp/decode_cuda.h"
#include "fomoe/combine.h"
#include "fomoe/expert_mlp.h"
#include "fomoe/workspace.h"
#include "grouped_gemm/products.h"

namespace fomoe::cuda {
namespace {

int64_t row_bytes(const ExpertMlp& mlp, int64_t width) {
  return mlp.routing.num_rows() * width * size_of(mlp.dtype());
}

int64_t tiles_bytes(const ExpertMlp& mlp) {
  return row_tiles_bytes(mlp.routing.num_rows(), mlp.routing.num_local_experts);
}

struct ForwardBuffers {
  ForwardBuffers(const ExpertMlp& mlp, void* base) : workspace(base) {
    tiles = workspace.take_bytes(tiles_bytes(mlp));
    hidden = workspace.take_bytes(row_bytes(mlp, mlp.expert_dim()));
    out = workspace.take_bytes(row_bytes(mlp, mlp.dim()));
  }

  Workspace workspace;
  void* tiles;
  void* hidden;  // [R, F]
  void* out;     // [R, D]
};

/// hidden and weight_parts, the workspace of the biases' sums, and d_x follow each other in the
/// same memory.
struct BackwardBuffers {
  BackwardBuffers(KernelPath path, const ExpertMlp& mlp, void* base) : workspace(base) {
    const Routing& routing = mlp.routing;
    tiles = workspace.take_bytes(tiles_bytes(mlp));
    d_pre = workspace.take_bytes(row_bytes(mlp, mlp.pre_dim()));
    num_parts = num_weight_parts(path, mlp.expert_dim());
    const int64_t part_bytes = mlp.dtype() == DType::kFloat64 ? 8 : 4;
    const auto lay_out = [&](void* memory) {
      Workspace first(memory);
      hidden = first.take_bytes(row_bytes(mlp, mlp.expert_dim()));
      weight_parts = first.take_bytes(routing.num_rows() * num_parts * part_bytes);
      return first.bytes();
    };
    const int64_t sums_bytes = expert_sums_bytes(mlp.dtype(), std::max(mlp.pre_dim(), mlp.dim()),
                                                 routing.num_rows(), routing.num_local_experts);
    shared =
        workspace.take_bytes(std::max({lay_out(nullptr), sums_bytes, row_bytes(mlp, mlp.dim())}));
    if (shared) lay_out(shared);
  }

  Workspace workspace;
  int64_t num_parts;
  void* tiles;
  void* d_pre;         // [R, P]
  void* shared;        // first hidden and weight_parts, then the sums' workspace, then d_x [R, D]
  void* hidden;        // [R, F], times the weights
  void* weight_parts;  // [R, num_parts]
};

/// The pieces that the products of one call have in common.
struct Products {
  RowSource tokens(const void* data) const {
    return {data, mlp.routing.num_tokens, mlp.routing.row_to_slot, mlp.routing.top_k};
  }
  RowSource rows(const void* data) const {
    return {data, mlp.routing.num_rows(), nullptr, mlp.routing.top_k};
  }
  RowProduct product(const RowSource& source, const ExpertMatrices& b, const void* bias,
                     Epilogue epilogue) const {
    RowProduct result = {};
    result.source = source;
    result.b = b;
    result.bias = bias;
    result.num_rows = mlp.routing.num_rows();
    result.tiles = tiles;
    result.epilogue = epilogue;
    result.activation = mlp.activation;
    return result;
  }
  WeightProduct product(const RowSource& left, int64_t left_width, const RowSource& right,
                        int64_t right_width, void* out) const {
    return {mlp.dtype(),
            left,
            right,
            mlp.routing.num_rows(),
            mlp.routing.offsets,
            mlp.routing.num_local_experts,
            left_width,
            right_width,
            out};
  }
  ExpertSums sums(const RowSource& source, const void* weights, int64_t width, void* out) const {
    return {
        mlp.dtype(), source, weights, width, mlp.routing.num_rows(), mlp.routing.num_local_experts,
        tiles,       out};
  }

  const ExpertMlp& mlp;
  RowTiles tiles;
};

RowTiles list_tiles(const ExpertMlp& mlp, void* workspace, Stream stream) {
  return list_row_tiles(mlp.routing.offsets, mlp.routing.num_local_experts, mlp.routing.num_rows(),
                        workspace, stream);
}

/// d_pre, hidden times the weights, and d_weights.
void hidden_gradient(KernelPath path, const Products& products, const void* grad_y,
                     const void* weights, const void* pre, const BackwardBuffers& buffers,
                     void* d_weights, Stream stream) {
  const ExpertMlp& mlp = products.mlp;
  RowProduct product =
      products.product(products.tokens(grad_y), mlp.w2, nullptr, Epilogue::kActivateBackward);
  product.pre = const_cast<void*>(pre);
  product.weights = weights;
  product.hidden = buffers.hidden;
  product.d_pre = buffers.d_pre;
  product.weight_parts = buffers.weight_parts;
  multiply(path, product, stream);
  finish_weight_gradient({mlp.dtype(), buffers.weight_parts, buffers.num_parts, grad_y, mlp.b2,
                          mlp.dim(), mlp.routing, d_weights},
                         stream);
}

}  // namespace

int64_t expert_mlp_workspace_bytes(KernelPath, const ExpertMlp& mlp) {
  return ForwardBuffers(mlp, nullptr).workspace.bytes();
}

int64_t expert_mlp_backward_workspace_bytes(KernelPath path, const ExpertMlp& mlp) {
  return BackwardBuffers(path, mlp, nullptr).workspace.bytes();
}

void expert_mlp(KernelPath path, const ExpertMlp& mlp, const void* x, const void* weights, void* y,
                void* pre, void* workspace, Stream stream) {
  const Routing& routing = mlp.routing;
  const ExpertMatrices w1 = mlp.w1.transposed(), w2 = mlp.w2.transposed();
  const ForwardBuffers buffers(mlp, workspace);
  const bool is_decode = decode::is_faster(path, w1, routing.num_rows()) &&
                         decode::is_faster(path, w2, routing.num_rows());
  const RowTiles tiles = is_decode ? RowTiles{} : list_tiles(mlp, buffers.tiles, stream);
  const auto compute = [&](const RowProduct& product) {
    if (is_decode) return decode::multiply(product, routing.offsets, stream);
    multiply(path, product, stream);
  };
  const Products products = {mlp, tiles};
  RowProduct up = products.product(products.tokens(x), w1, mlp.b1, Epilogue::kActivate);
  up.pre = pre;
  up.hidden = buffers.hidden;
  compute(up);
  RowProduct down = products.product(products.rows(buffers.hidden), w2, mlp.b2, Epilogue::kStore);
  down.out = buffers.out;
  compute(down);
  combine(mlp.dtype(), buffers.out, weights, routing, mlp.dim(), y, stream);
  if (pre) {
    zero_rows_past_end(routing.offsets, routing.num_local_experts, routing.num_rows(),
                       mlp.pre_dim() * size_of(mlp.dtype()), pre, stream);
  }
}

void expert_mlp_backward(KernelPath path, const ExpertMlp& mlp, const void* grad_y, const void* x,
                         const void* weights, const void* pre, const ExpertMlpGradient& gradient,
                         void* workspace, Stream stream) {
  const int64_t dim = mlp.dim(), expert_dim = mlp.expert_dim(), pre_dim = mlp.pre_dim();
  const BackwardBuffers buffers(path, mlp, workspace);
  const Products products = {mlp, list_tiles(mlp, buffers.tiles, stream)};
  const RowSource d_pre = products.rows(buffers.d_pre);
  hidden_gradient(path, products, grad_y, weights, pre, buffers, gradient.weights, stream);
  if (gradient.w2) {
    multiply(path,
             products.product(products.tokens(grad_y), dim, products.rows(buffers.hidden),
                              expert_dim, gradient.w2),
             stream);
  }
  if (gradient.w1) {
    multiply(path, products.product(d_pre, pre_dim, products.tokens(x), dim, gradient.w1), stream);
  }
  if (gradient.b1) {
    sum_expert_rows(products.sums(d_pre, nullptr, pre_dim, gradient.b1), buffers.shared, stream);
  }
  if (gradient.b2) {
    sum_expert_rows(products.sums(products.tokens(grad_y), weights, dim, gradient.b2),
                    buffers.shared, stream);
  }
  if (gradient.x) {
    RowProduct product = products.product(d_pre, mlp.w1, nullptr, Epilogue::kStore);
    product.out = buffers.shared;
    multiply(path, product, stream);
    combine(mlp.dtype(), buffers.shared, nullptr, mlp.routing, dim, gradient.x, stream);
  }
}

}  // namespace fomoe::cuda
