// SPDX-License-Identifier: Apache-2.0
#include "routings.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "arguments.h"
#include "fomoe/route.h"

namespace bench {
namespace {

/// K different experts per token, drawn one after the other in proportion to their weights: the K
/// largest of log(weight) + Gumbel noise.
std::vector<int32_t> draw_by_weight(const std::vector<double>& log_weights, int64_t num_tokens,
                                    int64_t top_k) {
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> uniform(1e-300, 1.0);
  std::vector<double> keys(log_weights.size());
  std::vector<int32_t> order(log_weights.size());
  std::vector<int32_t> ids;
  ids.reserve(static_cast<size_t>(num_tokens * top_k));
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (size_t e = 0; e < keys.size(); ++e) {
      keys[e] = log_weights[e] - std::log(-std::log(uniform(engine)));
    }
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                      [&](int32_t a, int32_t b) { return keys[a] > keys[b]; });
    ids.insert(ids.end(), order.begin(), order.begin() + top_k);
  }
  return ids;
}

/// Experts dealt in turn, to tokens in random order.
std::vector<int32_t> deal(int64_t num_tokens, int64_t top_k, int64_t num_experts) {
  std::mt19937_64 engine(1);
  std::vector<int64_t> tokens(static_cast<size_t>(num_tokens));
  std::iota(tokens.begin(), tokens.end(), 0);
  std::shuffle(tokens.begin(), tokens.end(), engine);
  std::vector<int32_t> ids(static_cast<size_t>(num_tokens * top_k));
  int64_t next = 0;
  for (const int64_t token : tokens) {
    for (int64_t k = 0; k < top_k; ++k) {
      ids[token * top_k + k] = static_cast<int32_t>(next++ % num_experts);
    }
  }
  return ids;
}

}  // namespace

const std::map<std::string, RoutingKind>& routing_kinds() {
  static const std::map<std::string, RoutingKind> kKinds = {{"uniform", RoutingKind::kUniform},
                                                            {"balanced", RoutingKind::kBalanced},
                                                            {"zipf", RoutingKind::kZipf},
                                                            {"one-hot", RoutingKind::kOneHot},
                                                            {"empty", RoutingKind::kEmpty}};
  return kKinds;
}

const char* name_of(RoutingKind kind) {
  for (const auto& [name, value] : routing_kinds()) {
    if (value == kind) return name.c_str();
  }
  return "";
}

void check_routing(RoutingKind kind, int64_t num_experts, int64_t top_k) {
  if (kind == RoutingKind::kEmpty && 2 * top_k > num_experts) {
    throw UsageError("--routing: empty leaves half of the experts, expected at least K of them, " +
                     std::to_string(top_k) + ", got a shape of " + std::to_string(num_experts) +
                     " experts");
  }
}

std::vector<int32_t> draw_ids(RoutingKind kind, double zipf_exponent, int64_t num_tokens,
                              int64_t top_k, int64_t num_experts) {
  std::vector<double> log_weights(static_cast<size_t>(num_experts), 0.0);
  switch (kind) {
    case RoutingKind::kBalanced:
      return deal(num_tokens, top_k, num_experts);
    case RoutingKind::kOneHot:
      return std::vector<int32_t>(static_cast<size_t>(num_tokens * top_k),
                                  static_cast<int32_t>(num_experts / 2));
    case RoutingKind::kZipf:
      for (int64_t e = 0; e < num_experts; ++e) {
        log_weights[e] = -zipf_exponent * std::log(static_cast<double>(e + 1));
      }
      break;
    case RoutingKind::kEmpty:
      for (int64_t e = 1; e < num_experts; e += 2) log_weights[e] = -INFINITY;
      break;
    case RoutingKind::kUniform:
      break;
  }
  return draw_by_weight(log_weights, num_tokens, top_k);
}

std::vector<int32_t> map_experts(int64_t num_experts, double ghost_share) {
  const auto ghosts = std::llround(static_cast<double>(num_experts) * ghost_share);
  std::vector<int32_t> map;
  int32_t next = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const bool is_ghost = (e + 1) * ghosts / num_experts > e * ghosts / num_experts;
    map.push_back(is_ghost ? -1 : next++);
  }
  return map;
}

HostRouting::HostRouting(std::vector<int32_t> ids_, std::vector<int32_t> expert_map_,
                         int64_t num_tokens_, int64_t top_k_)
    : ids(std::move(ids_)),
      expert_map(std::move(expert_map_)),
      slot_to_row(ids.size()),
      row_to_slot(ids.size()),
      num_tokens(num_tokens_),
      top_k(top_k_) {
  const int64_t num_local =
      std::count_if(expert_map.begin(), expert_map.end(), [](int32_t local) { return local >= 0; });
  offsets.resize(static_cast<size_t>(num_local) + 1);
  std::vector<char> workspace(static_cast<size_t>(fomoe::cpu::route_workspace_bytes(num_local)));
  fomoe::cpu::route(ids.data(), static_cast<int64_t>(ids.size()), expert_map.data(), num_local,
                    fomoe::kDropless, slot_to_row.data(), row_to_slot.data(), offsets.data(),
                    workspace.data());
}

int64_t HostRouting::num_active_experts() const {
  int64_t count = 0;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) count += offsets[e + 1] > offsets[e];
  return count;
}

}  // namespace bench
