// SPDX-License-Identifier: Apache-2.0
// Both products of an expert, "up" (H to 2I) and "down" (I to H), with their gradients.
#include <cmath>
#include <vector>

#include "device_routing.h"
#include "measure.h"

namespace {

using bench::Memory;
using fomoe::DType;
using fomoe::ExpertMatrices;

/// One Linear layer per expert: weight [E, outs, ins].
struct Layer {
  const char* name;
  int64_t ins, outs;
};

struct Arrays {
  Arrays(bench::Device& device, DType dtype, int64_t num_rows, int64_t num_experts, Layer layer)
      : ins(bench::random_array(device, dtype, num_rows * layer.ins)),
        outs(bench::random_array(device, dtype, num_rows * layer.outs)),
        weight(bench::random_array(device, dtype, num_experts * layer.ins * layer.outs,
                                   1 / std::sqrt(static_cast<double>(layer.ins)))),
        d_weight(device, weight.bytes()) {}

  Memory ins, outs, weight, d_weight;
};

/// What all measurements of a layer share.
struct Case {
  const bench::Shape& shape;
  const bench::HostRouting& host;
  const bench::DeviceRouting& routing;
  DType dtype;
  Layer layer;
  const std::vector<Arrays>& arrays;

  int64_t num_experts() const { return host.num_local_experts(); }
  ExpertMatrices weight(const Arrays& a) const {  // as b: ins x outs
    return {dtype, a.weight.data(), num_experts(), layer.ins, layer.outs, layer.ins * layer.outs,
            1,     layer.ins};
  }
  double flops() const {
    return 2.0 * static_cast<double>(host.num_executed_rows() * layer.ins * layer.outs);
  }
  double bytes(int64_t read_width, int64_t written_width, int64_t num_weights) const {
    return static_cast<double>(fomoe::size_of(dtype) * (host.num_executed_rows() * read_width +
                                                        shape.num_rows() * written_width +
                                                        num_weights * layer.ins * layer.outs));
  }
};

bench::Measurement measurement(bench::Session& session, const Case& c, const char* op,
                               fomoe::KernelPath path, const bench::Work& work, double bytes) {
  bench::Json labels = session.labels(op, c.shape, bench::name_of(c.dtype));
  labels.add("layer", c.layer.name).add("path", fomoe::name_of(path));
  labels.add("executed_rows", c.host.num_executed_rows());
  labels.add("active_experts", c.host.num_active_experts());
  bench::Measurement m = {labels, c.dtype,   work, static_cast<int>(c.arrays.size()),
                          bytes,  c.flops(), {}};
  const int64_t rows = c.host.num_executed_rows();
  const bool is_dgrad = std::string(op) == "dgrad";
  if (rows > 0) {
    m.dense = {
        {rows, is_dgrad ? c.layer.ins : c.layer.outs, is_dgrad ? c.layer.outs : c.layer.ins}};
  }
  return m;
}

void measure_rows(bench::Session& session, const Case& c, fomoe::KernelPath path, bool is_dgrad) {
  std::vector<bench::RowProductArrays> sets;
  for (const Arrays& a : c.arrays) {
    const ExpertMatrices b = is_dgrad ? c.weight(a).transposed() : c.weight(a);
    const Memory &from = is_dgrad ? a.outs : a.ins, &to = is_dgrad ? a.ins : a.outs;
    sets.push_back({from.data(), c.shape.num_rows(), b, c.routing.view().offsets, to.data()});
  }
  const int64_t read = is_dgrad ? c.layer.outs : c.layer.ins;
  const int64_t written = is_dgrad ? c.layer.ins : c.layer.outs;
  session.measure(measurement(session, c, is_dgrad ? "dgrad" : "forward", path,
                              session.product_ops().grouped_gemm(path, sets),
                              c.bytes(read, written, c.host.num_active_experts())));
}

void measure_weights(bench::Session& session, const Case& c, fomoe::KernelPath path) {
  std::vector<bench::WeightProductArrays> sets;
  for (const Arrays& a : c.arrays) {
    sets.push_back({c.dtype, a.outs.data(), a.ins.data(), c.shape.num_rows(),
                    c.routing.view().offsets, c.num_experts(), c.layer.outs, c.layer.ins,
                    a.d_weight.data()});
  }
  session.measure(measurement(session, c, "wgrad", path,
                              session.product_ops().grouped_gemm_wgrad(path, sets),
                              c.bytes(c.layer.ins + c.layer.outs, 0, c.num_experts())));
}

void measure_layer(bench::Session& session, const bench::Shape& shape,
                   const bench::HostRouting& host, const bench::DeviceRouting& routing, DType dtype,
                   Layer layer) {
  const int64_t elements = shape.num_rows() * (layer.ins + layer.outs) +
                           2 * host.num_local_experts() * layer.ins * layer.outs;
  const int num_sets = session.num_sets(elements * fomoe::size_of(dtype));
  std::vector<Arrays> arrays;
  for (int set = 0; set < num_sets; ++set) {
    arrays.emplace_back(session.device(), dtype, shape.num_rows(), host.num_local_experts(), layer);
  }
  const Case c = {shape, host, routing, dtype, layer, arrays};
  const Arrays& first = arrays.front();
  for (const auto& wanted : session.arguments().paths) {
    const fomoe::KernelPath path = session.path(
        wanted, {dtype,
                 {first.ins.data(), first.outs.data(), first.weight.data(), first.d_weight.data()},
                 {layer.ins, layer.outs, layer.ins * layer.outs}});
    if (session.wants("forward")) measure_rows(session, c, path, false);
    if (session.wants("dgrad")) measure_rows(session, c, path, true);
    if (session.wants("wgrad")) measure_weights(session, c, path);
  }
}

void measure(const bench::Program& program, const bench::Arguments& arguments) {
  bench::Session session(program, arguments);
  for (const bench::Shape& shape : arguments.shapes) {
    const bench::HostRouting host = bench::draw_routing(arguments, shape, arguments.ghost_share);
    const bench::DeviceRouting routing(session.device(), host);
    for (const DType dtype : arguments.dtypes) {
      measure_layer(session, shape, host, routing, dtype, {"up", shape.dim, shape.pre_dim()});
      measure_layer(session, shape, host, routing, dtype, {"down", shape.expert_dim, shape.dim});
    }
  }
}

}  // namespace

int main(int count, char** texts) {
  const bench::Program program = {"bench_grouped_gemm",
                                  "grouped products and their gradients",
                                  {"forward", "dgrad", "wgrad"},
                                  {DType::kBFloat16},
                                  true};
  return bench::run_program(program, count, texts, measure);
}
