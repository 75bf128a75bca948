// SPDX-License-Identifier: Apache-2.0
// Gates, logits and comparisons that the tests of the gate's CUDA kernels share.
#pragma once

#include <memory>
#include <optional>

#include "cuda/on_device.h"
#include "fomoe/topk_gate.h"

namespace gate_samples {

using fomoe::DType;
using fomoe::Gate;
using fomoe::GateScore;
using fomoe::GroupScore;
using Values = std::vector<double>;
using Ints = std::vector<int32_t>;

/// What a call reads, apart from the gate.
struct Input {
  DType dtype;
  Values logits;
  std::optional<Values> bias;
  std::optional<Ints> resident;
  int64_t misalignment = 0;  // of the arrays on the GPU, in elements
};

/// The input in the memory of the CPU or of the GPU.
template <typename Array>
struct Placed {
  fomoe::GateInput view() const {
    return {logits->data(), bias ? bias->data() : nullptr, resident};
  }

  std::unique_ptr<Array> logits, bias;
  std::shared_ptr<void> owner;
  const bool* resident = nullptr;
};

inline Placed<samples::Array> on_cpu(const Input& input) {
  Placed<samples::Array> placed;
  placed.logits = std::make_unique<samples::Array>(input.dtype, input.logits);
  if (input.bias) {
    placed.bias =
        std::make_unique<samples::Array>(samples::accumulate_dtype(input.dtype), *input.bias);
  }
  if (input.resident) {
    auto mask =
        std::make_shared<std::vector<uint8_t>>(input.resident->begin(), input.resident->end());
    placed.resident = reinterpret_cast<const bool*>(mask->data());
    placed.owner = mask;
  }
  return placed;
}

inline Placed<on_device::Array> on_gpu(const Input& input) {
  Placed<on_device::Array> placed;
  placed.logits = std::make_unique<on_device::Array>(input.dtype, input.logits, input.misalignment);
  if (input.bias) {
    placed.bias = std::make_unique<on_device::Array>(samples::accumulate_dtype(input.dtype),
                                                     *input.bias, input.misalignment);
  }
  if (input.resident) {
    const std::vector<uint8_t> mask(input.resident->begin(), input.resident->end());
    auto on_gpu = std::make_shared<on_device::Vector<uint8_t>>(mask);
    placed.resident = reinterpret_cast<const bool*>(on_gpu->data());
    placed.owner = on_gpu;
  }
  return placed;
}

/// Equal up to the tolerance, relative to the largest finite value; what is not finite is the same.
inline bool are_close(const Values& actual, const Values& expected, double tolerance) {
  double size = 0;
  for (const double value : expected) {
    if (std::isfinite(value)) size = std::max(size, std::abs(value));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(expected[i])) {
      if (!std::isnan(actual[i])) return false;
    } else if (actual[i] != expected[i] &&
               !(std::abs(actual[i] - expected[i]) <= tolerance * size)) {
      return false;
    }
  }
  return actual.size() == expected.size();
}

/// Bound on the relative error of values that depend on sums of `num_terms`.
inline double tolerance_of(DType dtype, int64_t num_terms) {
  const double unit = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  return unit * (50 + static_cast<double>(num_terms));
}

enum class Kind { kRandom, kTies, kOneUlp, kSpecial };
inline constexpr Kind kAllKinds[] = {Kind::kRandom, Kind::kTies, Kind::kOneUlp, Kind::kSpecial};

inline Values logits_of(Kind kind, int64_t count, uint32_t seed) {
  Values values = harness::random_values(count, seed);
  std::mt19937 engine(seed);
  for (double& value : values) {
    switch (kind) {
      case Kind::kRandom:
        value *= 8;
        break;
      case Kind::kTies:
        value = std::round(value * 3);
        break;
      case Kind::kOneUlp:  // neighbouring numbers, whose sigmoids often are equal
        value = 2 + static_cast<double>(engine() % 8) * 0x1p-22;
        break;
      case Kind::kSpecial: {
        constexpr double kValues[] = {NAN, INFINITY, -INFINITY, -0.0, 0.0, 100, -100, 1};
        const auto i = engine() % 24;
        if (i < 8) value = kValues[i];
        break;
      }
    }
  }
  return values;
}

/// Divisors of E that make sense as numbers of groups, and how many are kept.
inline void choose_groups(Gate& gate, std::mt19937& engine) {
  std::vector<int64_t> divisors;
  for (int64_t n = 1; n <= gate.num_experts; ++n) {
    if (gate.num_experts % n == 0) divisors.push_back(n);
  }
  gate.num_groups = divisors[engine() % divisors.size()];
  gate.top_k_groups = 1 + static_cast<int64_t>(engine() % gate.num_groups);
  const int64_t most = gate.top_k_groups * (gate.num_experts / gate.num_groups);
  gate.top_k = std::min(gate.top_k, most);
  gate.group_score = engine() % 2 ? GroupScore::kMax : GroupScore::kTop2Sum;
}

/// A gate of the whole menu.
inline Gate random_gate(std::mt19937& engine, int64_t num_tokens, int64_t num_experts,
                        int64_t top_k) {
  Gate gate = {num_tokens,
               num_experts,
               top_k,
               static_cast<GateScore>(engine() % 3),
               engine() % 2 == 0,
               engine() % 2 ? 1.0 : 2.5};
  gate.score_after_top_k = engine() % 3 == 0;
  if (engine() % 2) choose_groups(gate, engine);
  return gate;
}

inline Input random_input(std::mt19937& engine, const Gate& gate, Kind kind) {
  const auto seed = static_cast<uint32_t>(engine());
  Input input = {samples::kAllDTypes[engine() % 4],
                 logits_of(kind, gate.num_tokens * gate.num_experts, seed),
                 {},
                 {}};
  if (engine() % 2) {
    input.bias = kind == Kind::kRandom ? harness::random_values(gate.num_experts, seed + 1)
                                       : Values(gate.num_experts, 0.25);
  }
  if (engine() % 3 == 0) {
    Ints mask(gate.num_experts);
    for (int32_t& is_resident : mask) is_resident = engine() % 3 != 0;
    input.resident = mask;
  }
  input.misalignment = static_cast<int64_t>(engine() % 3 == 0);
  return input;
}

}  // namespace gate_samples
