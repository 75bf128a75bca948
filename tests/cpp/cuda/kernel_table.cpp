// SPDX-License-Identifier: Apache-2.0
// Runs every op on one small shape and writes what its kernels did, one JSON object per line, to
// the file it is given; tools/check_kernels.py prints them. Fails if an op touches fewer or more
// bytes than the formula says, which counts every byte once, however often it is read again.
//
//     kernel_table FILE
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>

#include "counters.h"
#include "cuda/on_device.h"
#include "fomoe/permute.h"
#include "fomoe/route.h"

namespace {

using fomoe::DType;
using fomoe::emulation::KernelCounts;
using fomoe::emulation::Traffic;

// bfloat16, every expert resident.
constexpr int64_t T = 128, D = 256, E = 8, K = 2, R = T * K, b = 2;

class Table {
 public:
  explicit Table(const char* file) : file_(file) {}

  /// Adds the kernels that `run` launches. `formula`: the bytes that the op must touch, or 0 where
  /// its launches hand data to each other, of which no formula speaks.
  void add(const std::string& op, int64_t formula, const std::function<void()>& run) {
    const fomoe::emulation::Counters counters = fomoe::emulation::count(run);
    int64_t touched = 0;
    for (const auto& [name, counts] : counters) {
      const int64_t distinct = counts.loads().distinct_bytes + counts.stores().distinct_bytes;
      write(op, name, counts, distinct, formula);
      touched += distinct;
    }
    if (formula && touched != formula) {
      throw std::runtime_error(op + " touches " + std::to_string(touched) + " bytes, not " +
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
          << field("distinct bytes", number(distinct))
          << field("formula", formula ? number(formula) : "null")
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

on_device::Array random(DType dtype, int64_t count) {
  return on_device::Array(dtype, harness::random_values(count, 1));
}

void add_all(Table& table) {
  const samples::OwnedRouting host(ids(), K, iota(E), E);
  const on_device::Routing routing(host.view);
  const on_device::Array x = random(DType::kBFloat16, T * D), rows(DType::kBFloat16, R * D);

  // Slots and the last offset are the tables that it reads.
  table.add("permute", b * D * (T + R) + 4 * R + 4, [&] {
    fomoe::cuda::permute(DType::kBFloat16, x.data(), routing.view, D, rows.data(), nullptr);
  });

  const on_device::Vector<int32_t> device_ids(ids()), expert_map(iota(E));
  const on_device::Vector<int32_t> slot_to_row(R), row_to_slot(R), offsets(E + 1);
  const on_device::Memory workspace(fomoe::cuda::route_workspace_bytes(R, E));
  table.add("route", 0, [&] {
    fomoe::cuda::route(device_ids.data(), R, expert_map.data(), E, E, fomoe::kDropless,
                       slot_to_row.data(), row_to_slot.data(), offsets.data(), workspace.data(),
                       nullptr);
  });
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
