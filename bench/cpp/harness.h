// SPDX-License-Identifier: Apache-2.0
// A small benchmark harness: measure(...) times a call and prints one JSON line.
//
// Every run starts with cold caches: a buffer larger than any last-level cache of a desktop is
// written in between. Reported are the median, the quartiles and the best, since a shared machine
// has a long tail, and the bandwidth at the median against the bytes the op has to move.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "fomoe/dtype.h"
#include "fomoe/route.h"
#include "fomoe/routing.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bench {

using fomoe::DType;

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "";
}

inline int num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

/// What is measured: `shape` as the inside of a JSON object, `bytes` the least an op must move.
struct Case {
  std::string op;
  std::string shape;
  DType dtype;
  int64_t bytes;
};

inline void flush_caches() {
  static std::vector<char> buffer(int64_t{256} << 20);
  static char value = 0;
  std::fill(buffer.begin(), buffer.end(), ++value);
}

/// Runs for about a second, at least ten times, and prints the line.
template <typename Function>
void measure(const Case& what, const Function& function) {
  using Clock = std::chrono::steady_clock;
  function();  // touches every page
  std::vector<double> microseconds;
  const auto deadline = Clock::now() + std::chrono::seconds(1);
  while (microseconds.size() < 10 || Clock::now() < deadline) {
    flush_caches();
    const auto begin = Clock::now();
    function();
    microseconds.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  std::sort(microseconds.begin(), microseconds.end());
  const auto quantile = [&](double q) {
    return microseconds[static_cast<size_t>(q * static_cast<double>(microseconds.size() - 1))];
  };
  std::printf(
      "{\"op\": \"%s\", %s, \"dtype\": \"%s\", \"threads\": %d, \"runs\": %zu, \"median_us\": "
      "%.1f, "
      "\"quartiles_us\": [%.1f, %.1f], \"best_us\": %.1f, \"bytes\": %lld, \"gb_per_s\": %.2f}\n",
      what.op.c_str(), what.shape.c_str(), name_of(what.dtype), num_threads(), microseconds.size(),
      quantile(0.5), quantile(0.25), quantile(0.75), microseconds.front(),
      static_cast<long long>(what.bytes), static_cast<double>(what.bytes) / quantile(0.5) / 1e3);
  std::fflush(stdout);
}

/// Random bytes that are small numbers in every dtype.
inline std::vector<char> random_array(DType dtype, int64_t count) {
  std::mt19937 engine(1);
  std::vector<char> bytes(count * fomoe::size_of(dtype));
  fomoe::dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* values = reinterpret_cast<T*>(bytes.data());
    for (int64_t i = 0; i < count; ++i) {
      const double value = static_cast<double>(engine()) / 2147483648.0 - 1.0;
      values[i] = fomoe::from_accumulate<T>(static_cast<fomoe::Accumulate<T>>(value));
    }
  });
  return bytes;
}

/// Uniform choices among experts that are all resident.
class UniformRouting {
 public:
  UniformRouting(int64_t num_tokens, int64_t top_k, int64_t num_experts)
      : ids_(num_tokens * top_k),
        expert_map_(num_experts),
        slot_to_row_(ids_.size()),
        row_to_slot_(ids_.size()),
        offsets_(num_experts + 1) {
    std::mt19937 engine(2);
    for (int32_t& id : ids_) id = static_cast<int32_t>(engine() % num_experts);
    for (int64_t e = 0; e < num_experts; ++e) expert_map_[e] = static_cast<int32_t>(e);
    std::vector<char> workspace(fomoe::cpu::route_workspace_bytes(num_experts));
    fomoe::cpu::route(ids_.data(), num_tokens * top_k, expert_map_.data(), num_experts,
                      fomoe::kDropless, slot_to_row_.data(), row_to_slot_.data(), offsets_.data(),
                      workspace.data());
    view = {slot_to_row_.data(), row_to_slot_.data(), offsets_.data(), num_tokens, top_k,
            num_experts};
  }

  fomoe::Routing view;

 private:
  std::vector<int32_t> ids_, expert_map_, slot_to_row_, row_to_slot_, offsets_;
};

inline std::string shape(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  std::string text;
  for (const auto& [name, size] : sizes) {
    text += (text.empty() ? "\"" : ", \"") + std::string(name) + "\": " + std::to_string(size);
  }
  return text;
}

}  // namespace bench
