// SPDX-License-Identifier: Apache-2.0
// Everything that moves rows and makes no products.
#include <vector>

#include "device_routing.h"
#include "measure.h"

namespace {

using bench::Memory;
using fomoe::DType;

struct Arrays {
  Arrays(bench::Device& device, DType dtype, const bench::Shape& shape)
      : sum(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
        x(bench::random_array(device, dtype, shape.tokens * shape.dim)),
        rows(bench::random_array(device, dtype, shape.num_rows() * shape.dim)),
        weights(bench::random_array(device, sum, shape.num_rows())),
        out_rows(device, rows.bytes()),
        y(device, x.bytes()),
        d_weights(device, weights.bytes()) {}

  bench::RowArrays view(const fomoe::Routing& routing, int64_t width) const {
    return {routing,
            width,
            x.data(),
            rows.data(),
            weights.data(),
            /*grad_y=*/x.data(),
            out_rows.data(),
            y.data(),
            d_weights.data()};
  }

  DType sum;
  Memory x, rows, weights, out_rows, y, d_weights;
};

void measure_route(bench::Session& session, const bench::Shape& shape,
                   const bench::HostRouting& host) {
  const int num_sets = session.num_sets(24 * shape.num_rows());
  std::vector<bench::DeviceRouting> routings;  // of its own: they are overwritten
  std::vector<bench::RouteArrays> sets;
  for (int set = 0; set < num_sets; ++set) {
    routings.emplace_back(session.device(), host);
    sets.push_back(routings.back().route_arrays());
  }
  bench::Json labels = session.labels("route", shape, "int32");
  labels.add("executed_rows", host.num_executed_rows());
  session.measure({labels,
                   DType::kFloat32,
                   session.ops().route(sets),
                   num_sets,
                   16.0 * static_cast<double>(shape.num_rows()),
                   0,
                   {}});
}

void measure_rows(bench::Session& session, const bench::Shape& shape,
                  const bench::HostRouting& host, const bench::DeviceRouting& routing,
                  DType dtype) {
  const int64_t row_bytes = shape.dim * fomoe::size_of(dtype);
  const int64_t all = shape.num_rows(), executed = host.num_executed_rows();
  const int num_sets = session.num_sets((2 * all + 2 * shape.tokens) * row_bytes);
  std::vector<Arrays> arrays;
  std::vector<bench::RowArrays> sets;
  arrays.reserve(static_cast<size_t>(num_sets));
  for (int set = 0; set < num_sets; ++set) {
    arrays.emplace_back(session.device(), dtype, shape);
    sets.push_back(arrays.back().view(routing.view(), shape.dim));
  }
  const auto run = [&](const char* op, const bench::Work& work, int64_t bytes) {
    bench::Json labels = session.labels(op, shape, bench::name_of(dtype));
    labels.add("executed_rows", executed);
    session.measure({labels, dtype, work, num_sets, static_cast<double>(bytes), 0, {}});
  };
  bench::Ops& ops = session.ops();
  if (session.wants("permute")) {
    run("permute", ops.permute(dtype, sets), (shape.tokens + all) * row_bytes);
  }
  if (session.wants("combine")) {
    run("combine", ops.combine(dtype, sets), (executed + shape.tokens) * row_bytes + 8 * all);
  }
  if (session.wants("combine_backward")) {
    run("combine_backward", ops.combine_backward(dtype, sets),
        (shape.tokens + executed + all) * row_bytes + 12 * all);
  }
}

void measure(const bench::Program& program, const bench::Arguments& arguments) {
  bench::Session session(program, arguments);
  for (const bench::Shape& shape : arguments.shapes) {
    const bench::HostRouting host = bench::draw_routing(arguments, shape, arguments.ghost_share);
    const bench::DeviceRouting routing(session.device(), host);
    if (session.wants("route")) measure_route(session, shape, host);
    for (const DType dtype : arguments.dtypes) {
      measure_rows(session, shape, host, routing, dtype);
    }
  }
}

}  // namespace

int main(int count, char** texts) {
  const bench::Program program = {"bench_permute",
                                  "ops that move rows and make no products",
                                  {"route", "permute", "combine", "combine_backward"},
                                  {DType::kBFloat16},
                                  false};
  return bench::run_program(program, count, texts, measure);
}
