// SPDX-License-Identifier: Apache-2.0
// The experts' part of a layer: training forward and backward, decoding, and what skipping saves.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "device_routing.h"
#include "expert_mlp_arrays.h"
#include "measure.h"

namespace {

using bench::ExpertMlpMemory;
using fomoe::DType;
using fomoe::KernelPath;

constexpr double kGhostShares[] = {0.0, 0.25, 0.5, 0.75, 1.0};

bench::Json labels_of(const bench::Session& session, const char* op, const bench::Shape& shape,
                      DType dtype, const bench::HostRouting& host, KernelPath path) {
  bench::Json labels = session.labels(op, shape, bench::name_of(dtype));
  labels.add("path", fomoe::name_of(path)).add("executed_rows", host.num_executed_rows());
  return labels.add("active_experts", host.num_active_experts());
}

KernelPath path_of(const bench::Session& session, const std::optional<KernelPath>& wanted,
                   const bench::Shape& shape, const bench::ExpertMlpArrays& arrays) {
  const fomoe::ExpertMlp& mlp = arrays.mlp;
  return session.path(wanted, {mlp.dtype(),
                               {arrays.x, mlp.w1.data, mlp.w2.data, mlp.b1, mlp.b2, arrays.y},
                               {shape.dim, shape.expert_dim, shape.pre_dim()}});
}

/// Products of as many FLOPs as the forward, or, twice, as the backward.
std::vector<bench::DenseProduct> dense_products(const bench::Shape& shape, int64_t rows,
                                                bool is_backward) {
  if (rows == 0) return {};
  std::vector<bench::DenseProduct> products = {{rows, shape.pre_dim(), shape.dim},
                                               {rows, shape.dim, shape.expert_dim}};
  if (is_backward) products.insert(products.end(), {products[0], products[1]});
  return products;
}

void measure_training(bench::Session& session, const bench::Shape& shape, DType dtype,
                      const std::optional<KernelPath>& wanted) {
  const bench::HostRouting host =
      bench::draw_routing(session.arguments(), shape, session.arguments().ghost_share);
  const bench::DeviceRouting routing(session.device(), host);
  const int num_sets = session.num_sets(ExpertMlpMemory::bytes(shape, dtype));
  std::vector<ExpertMlpMemory> memory;
  std::vector<bench::ExpertMlpArrays> sets;
  for (int set = 0; set < num_sets; ++set) {
    memory.emplace_back(session.device(), shape, dtype, /*trains=*/true);
    sets.push_back(memory.back().view(routing.view()));
  }
  const KernelPath path = path_of(session, wanted, shape, sets.front());
  const bench::ExpertTraffic traffic(shape, dtype, host);
  const int64_t rows = host.num_executed_rows();
  bench::ProductOps& ops = session.product_ops();
  const bench::Work forward = ops.expert_mlp(path, sets);
  for (int set = 0; set < num_sets; ++set) forward(set);  // pre for the backward
  if (session.wants("forward")) {
    session.measure({labels_of(session, "expert_mlp", shape, dtype, host, path), dtype, forward,
                     num_sets, traffic.forward(/*saves_pre=*/true), traffic.flops(),
                     dense_products(shape, rows, false)});
  }
  if (session.wants("backward")) {
    session.measure({labels_of(session, "expert_mlp_backward", shape, dtype, host, path), dtype,
                     ops.expert_mlp_backward(path, sets), num_sets, traffic.backward(),
                     2 * traffic.flops(), dense_products(shape, rows, true)});
  }
}

/// A few tokens, each call with others: what has to be read are the weights of their experts.
void measure_decode(bench::Session& session, bench::Shape shape, int64_t tokens, DType dtype,
                    const std::optional<KernelPath>& wanted) {
  constexpr int kBatches = 16;
  const bool rotates = session.arguments().cold;
  shape.tokens = tokens;
  ExpertMlpMemory memory(session.device(), shape, dtype, /*trains=*/false);
  // One token meets each expert in one batch only, so that no weights are left in the cache.
  const auto kind = tokens == 1 ? bench::RoutingKind::kBalanced : session.arguments().routing;
  const int num_batches = rotates ? kBatches : 1;
  const std::vector<int32_t> ids =
      bench::draw_ids(kind, session.arguments().zipf_exponent, num_batches * tokens, shape.top_k,
                      shape.num_experts);
  std::vector<bench::HostRouting> hosts;
  std::vector<bench::DeviceRouting> routings;
  std::vector<bench::ExpertMlpArrays> sets;
  double bytes = 0;
  for (int batch = 0; batch < num_batches; ++batch) {
    const auto first = ids.begin() + batch * shape.num_rows();
    hosts.emplace_back(std::vector<int32_t>(first, first + shape.num_rows()),
                       bench::map_experts(shape.num_experts, 0), tokens, shape.top_k);
    routings.emplace_back(session.device(), hosts.back());
    sets.push_back(memory.view(routings.back().view()));
    bytes += bench::ExpertTraffic(shape, dtype, hosts.back()).forward(false) / num_batches;
  }
  const KernelPath path = path_of(session, wanted, shape, sets.front());
  session.measure({labels_of(session, "decode", shape, dtype, hosts.front(), path),
                   dtype,
                   session.product_ops().expert_mlp(path, sets),
                   num_batches,
                   bytes,
                   bench::ExpertTraffic(shape, dtype, hosts.front()).flops(),
                   {}});
}

/// Forward and backward with 0 to 100% ghosts, in turns; cost: time over that without ghosts.
void measure_skipping(bench::Session& session, const bench::Shape& shape, DType dtype,
                      const std::optional<KernelPath>& wanted) {
  const ExpertMlpMemory memory(session.device(), shape, dtype, /*trains=*/true);
  std::vector<bench::HostRouting> hosts;
  std::vector<bench::DeviceRouting> routings;
  std::vector<std::unique_ptr<bench::Stopwatch>> owned;
  std::vector<bench::Stopwatch*> stopwatches;
  KernelPath path = KernelPath::kSimple;
  for (const double share : kGhostShares) {
    hosts.push_back(bench::draw_routing(session.arguments(), shape, share));
    routings.emplace_back(session.device(), hosts.back());
    const std::vector<bench::ExpertMlpArrays> sets = {memory.view(routings.back().view())};
    path = path_of(session, wanted, shape, sets.front());
    const bench::Work forward = session.product_ops().expert_mlp(path, sets);
    const bench::Work backward = session.product_ops().expert_mlp_backward(path, sets);
    const bench::Work both = [forward, backward](int set) {
      forward(set);
      backward(set);
    };
    owned.push_back(session.stopwatch(both, 1));
    stopwatches.push_back(owned.back().get());
  }
  const auto times = bench::interleave(stopwatches, session.arguments().seconds);
  for (size_t i = 0; i < times.size(); ++i) {
    bench::Json line = labels_of(session, "skip", shape, dtype, hosts[i], path);
    const double executed =
        static_cast<double>(hosts[i].num_executed_rows()) / static_cast<double>(shape.num_rows());
    const bench::Spread cost = bench::paired_ratio(times[i], times[0]);
    line.add("wanted_ghost_share", kGhostShares[i]).add("ghost_share", 1 - executed);
    bench::add_times(line, times[i]);
    line.add("cost",
             bench::Json().add("median", cost.median).add("quartiles", {cost.low, cost.high}));
    line.add("cost_over_executed_share", executed > 0 ? cost.median / executed : NAN);
    session.print(line);
  }
}

void measure(const bench::Program& program, const bench::Arguments& arguments) {
  bench::Session session(program, arguments);
  for (const bench::Shape& shape : arguments.shapes) {
    for (const DType dtype : arguments.dtypes) {
      for (const auto& path : arguments.paths) {
        if (session.wants("forward") || session.wants("backward")) {
          measure_training(session, shape, dtype, path);
        }
        if (session.wants("decode")) {
          for (const int64_t tokens : arguments.decode_tokens) {
            measure_decode(session, shape, tokens, dtype, path);
          }
        }
        if (session.wants("skip")) measure_skipping(session, shape, dtype, path);
      }
    }
  }
}

}  // namespace

int main(int count, char** texts) {
  const bench::Program program = {"bench_expert_mlp",
                                  "the experts' part of a layer",
                                  {"forward", "backward", "decode", "skip"},
                                  {DType::kBFloat16},
                                  true};
  return bench::run_program(program, count, texts, measure);
}
