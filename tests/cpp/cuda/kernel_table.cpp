// SPDX-License-Identifier: Apache-2.0
// Runs every op on one small shape and writes what its kernels did, one JSON object per line, to
// the file it is given; tools/check_kernels.py prints them. The formula is that of the bytes that
// an op has to move, each byte once and without the tables of the routing; an op that touches fewer
// was not run on what the formula is for.
//
//     kernel_table FILE
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>

#include "counters.h"
#include "cuda/on_device.h"
#include "fomoe/combine.h"
#include "fomoe/destinations.h"
#include "fomoe/permute.h"
#include "fomoe/route.h"
#include "fomoe/topk_gate.h"
#include "grouped_gemm/products.h"

namespace {

using fomoe::DType;
using fomoe::Routing;
using fomoe::emulation::KernelCounts;
using fomoe::emulation::Traffic;

// Every expert is resident.
constexpr int64_t T = 64, D = 128, F = 64, E = 4, K = 2, R = T * K;
constexpr DType kDType = DType::kBFloat16;
constexpr int64_t b = 2;  // bytes of an element

class Table {
 public:
  explicit Table(const char* file) : file_(file) {}

  /// Adds the kernels that `run` launches.
  void add(const std::string& op, int64_t formula, const std::function<void()>& run) {
    const fomoe::emulation::Counters counters = fomoe::emulation::count(run);
    int64_t touched = 0;
    for (const auto& [name, counts] : counters) {
      const int64_t distinct = counts.loads().distinct_bytes + counts.stores().distinct_bytes;
      write(op, name, counts, distinct, formula);
      touched += distinct;
    }
    if (touched < formula) {
      throw std::runtime_error(op + " touches " + std::to_string(touched) + " bytes of " +
                               std::to_string(formula));
    }
  }

 private:
  void write(const std::string& op, const std::string& kernel, const KernelCounts& counts,
             int64_t distinct, int64_t formula) {
    const Traffic loads = counts.loads(), stores = counts.stores();
    const auto field = [](const char* name, const std::string& value) {
      return ", \"" + std::string(name) + "\": " + value;
    };
    const auto number = [](int64_t value) { return std::to_string(value); };
    file_ << "{\"op\": \"" << op << "\", \"emulated kernel\": \"" << kernel << '"'
          << field("threads", number(counts.threads))
          << field("shared bytes", number(counts.shared_bytes))
          << field("loaded bytes", number(loads.bytes))
          << field("stored bytes", number(stores.bytes))
          << field("distinct bytes", number(distinct)) << field("formula", number(formula))
          << field("sectors per load", ratio(loads)) << field("per store", ratio(stores))
          << field("bank conflicts",
                   number(counts.shared_loads.conflicts + counts.shared_stores.conflicts))
          << "}\n";
  }

  static std::string ratio(const Traffic& traffic) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f",
                  traffic.requests ? double(traffic.sectors) / traffic.requests : 0.0);
    return text;
  }

  std::ofstream file_;
};

std::vector<int32_t> iota(int32_t count) {
  std::vector<int32_t> numbers(count);
  for (int32_t i = 0; i < count; ++i) numbers[i] = i;
  return numbers;
}

/// Slot s chose expert 5 s mod E.
std::vector<int32_t> ids() {
  std::vector<int32_t> result(R);
  for (int64_t slot = 0; slot < R; ++slot) result[slot] = static_cast<int32_t>(5 * slot % E);
  return result;
}

on_device::Array random(int64_t count) {
  return on_device::Array(kDType, harness::random_values(count, 1));
}

on_device::Array sums(int64_t count) {
  return on_device::Array(DType::kFloat32, harness::random_values(count, 2));
}

void add_row_ops(Table& table, const Routing& routing) {
  const on_device::Array tokens = random(T * D), rows = random(R * D), weights = sums(R);
  const on_device::Array new_rows(kDType, R * D), new_tokens(kDType, T * D);
  const on_device::Array d_weights(DType::kFloat32, R);
  table.add("permute", b * D * (T + R), [&] {
    fomoe::cuda::permute(kDType, tokens.data(), routing, D, new_rows.data(), nullptr);
  });
  table.add("combine", b * D * (R + T) + 8 * R, [&] {
    fomoe::cuda::combine(kDType, rows.data(), weights.data(), routing, D, new_tokens.data(),
                         nullptr);
  });
  table.add("combine backward", b * D * (T + 2 * R) + 12 * R, [&] {
    fomoe::cuda::combine_backward(kDType, tokens.data(), rows.data(), weights.data(), routing, D,
                                  new_rows.data(), d_weights.data(), nullptr);
  });
}

void add_destinations(Table& table) {
  const on_device::Vector<int32_t> chosen(ids()), groups(iota(E)), result(R);
  table.add("destinations", 8 * R, [&] {
    fomoe::cuda::destinations(chosen.data(), T, K, groups.data(), E, E, result.data(), nullptr);
  });
}

void add_route(Table& table) {
  const on_device::Vector<int32_t> chosen(ids()), expert_map(iota(E));
  const on_device::Vector<int32_t> slot_to_row(R), row_to_slot(R), offsets(E + 1);
  const on_device::Memory workspace(fomoe::cuda::route_workspace_bytes(R, E));
  table.add("route", 12 * R, [&] {
    fomoe::cuda::route(chosen.data(), R, expert_map.data(), E, E, fomoe::kDropless,
                       slot_to_row.data(), row_to_slot.data(), offsets.data(), workspace.data(),
                       nullptr);
  });
}

void add_gate(Table& table) {
  const fomoe::Gate gate = {T, E, K, fomoe::GateScore::kSoftmax, true, 1.0};
  const on_device::Array logits = sums(T * E), weights(DType::kFloat32, R);
  const on_device::Array prob_sum(DType::kFloat32, E), z_sum(DType::kFloat32, 1);
  const on_device::Vector<int32_t> chosen(R);
  const on_device::Vector<int64_t> counts(E);
  const on_device::Memory workspace(fomoe::cuda::topk_gate_workspace_bytes(DType::kFloat32, gate));
  table.add("topk_gate", 4 * T * E + 8 * T * K, [&] {
    fomoe::cuda::topk_gate(
        DType::kFloat32, gate, {logits.data()},
        {chosen.data(), weights.data(), counts.data(), prob_sum.data(), z_sum.data()},
        workspace.data(), nullptr);
  });
  const on_device::Array d_weights = sums(R), d_logits(DType::kFloat32, T * E);
  const on_device::Memory more(
      fomoe::cuda::topk_gate_backward_workspace_bytes(DType::kFloat32, gate));
  table.add("topk_gate backward", 8 * T * E + 8 * T * K, [&] {
    fomoe::cuda::topk_gate_backward(DType::kFloat32, gate, {logits.data()}, chosen.data(),
                                    {d_weights.data(), nullptr, nullptr}, d_logits.data(),
                                    more.data(), nullptr);
  });
}

using MultiplyRows = void (*)(const fomoe::cuda::RowProduct&, fomoe::cuda::Stream);
using MultiplyWeights = void (*)(const fomoe::cuda::WeightProduct&, fomoe::cuda::Stream);

/// The up projection with its activation, the down projection, and the up weights' gradient, with
/// the tokens gathered.
void add_products(Table& table, const std::string& family, const Routing& routing,
                  MultiplyRows multiply_rows, MultiplyWeights multiply_weights) {
  const on_device::Array tokens = random(T * D), w1 = random(E * 2 * F * D);
  const on_device::Array w2 = random(E * D * F), d_pre = random(R * 2 * F);
  const on_device::Array pre(kDType, R * 2 * F), hidden(kDType, R * F), rows(kDType, R * D);
  const on_device::Array d_w1(kDType, E * 2 * F * D);
  const on_device::Memory workspace(fomoe::cuda::row_tiles_bytes(R, E));
  fomoe::cuda::RowProduct up = {};
  up.source = {tokens.data(), T, routing.row_to_slot, K};
  up.b = {kDType, w1.data(), E, D, 2 * F, 2 * F * D, 1, D};
  up.num_rows = R;
  up.tiles = fomoe::cuda::list_row_tiles(routing.offsets, E, R, workspace.data(), nullptr);
  up.epilogue = fomoe::cuda::Epilogue::kActivate;
  up.activation = fomoe::Activation::kSwiglu;
  up.hidden = hidden.data();
  up.pre = pre.data();
  table.add(family + " up", b * (T * D + 2 * E * D * F + 3 * R * F),
            [&] { multiply_rows(up, nullptr); });

  fomoe::cuda::RowProduct down = {};
  down.source = {hidden.data(), R, nullptr, 0};
  down.b = {kDType, w2.data(), E, F, D, D * F, 1, F};
  down.num_rows = R;
  down.tiles = up.tiles;
  down.epilogue = fomoe::cuda::Epilogue::kStore;
  down.out = rows.data();
  table.add(family + " down", b * (R * F + E * D * F + R * D),
            [&] { multiply_rows(down, nullptr); });

  const fomoe::cuda::WeightProduct d_up = {kDType,
                                           {d_pre.data(), R, nullptr, 0},
                                           {tokens.data(), T, routing.row_to_slot, K},
                                           R,
                                           routing.offsets,
                                           E,
                                           2 * F,
                                           D,
                                           d_w1.data()};
  table.add(family + " wgrad up", b * (2 * R * F + T * D + 2 * E * D * F),
            [&] { multiply_weights(d_up, nullptr); });
}

void add_all(Table& table) {
  const samples::OwnedRouting host(ids(), K, iota(E), E);
  const on_device::Routing owner(host.view);
  add_gate(table);
  add_destinations(table);
  add_route(table);
  add_row_ops(table, owner.view);
  using namespace fomoe::cuda;
  add_products(table, "simple", owner.view, simple::multiply, simple::multiply);
  add_products(table, "sm80", owner.view, sm80::multiply, sm80::multiply);
  add_products(table, "sm90", owner.view, sm90::multiply, sm90::multiply);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: kernel_table FILE\n");
    return 2;
  }
  try {
    Table table(argv[1]);
    add_all(table);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_table: %s\n", error.what());
    return 1;
  }
  return 0;
}
