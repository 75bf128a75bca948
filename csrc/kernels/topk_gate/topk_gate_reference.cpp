// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fomoe/topk_gate.h"

namespace fomoe::reference {
namespace {

using Row = std::vector<double>;
using Ids = std::vector<int32_t>;

bool is_better(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return !std::isnan(a) && std::isnan(b);
  return a > b;
}

/// Sorted by score, best first, ties in the given order.
Ids ranking(const Row& scores, Ids order) {
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return is_better(scores[a], scores[b]); });
  return order;
}

double largest(const Row& logits) {
  double result = -INFINITY;
  for (double logit : logits) result = std::isnan(logit) ? result : std::max(result, logit);
  return result;
}

double total(const Row& row) { return std::accumulate(row.begin(), row.end(), 0.0); }

double logsumexp(const Row& logits) {
  if (logits.empty()) return 0;
  const double shift = largest(logits);
  double sum = 0;
  for (double logit : logits) sum += logit == shift ? 1.0 : std::exp(logit - shift);
  return shift + std::log(sum);
}

Row shares(Row values) {
  const double sum = total(values);
  for (double& value : values) value = sum == 0 ? 0 : value / sum;
  return values;
}

Row softmax(Row logits) {
  const double shift = largest(logits);
  for (double& value : logits) value = std::exp(value - shift);
  return shares(logits);
}

Row sigmoid(Row logits) {
  for (double& value : logits) value = value < -708 ? 0 : 1 / (1 + std::exp(-value));
  return logits;
}

Ids eligible_experts(const Gate& gate, const GateInput& input) {
  Ids experts;
  for (int32_t e = 0; e < gate.num_experts; ++e) {
    if (!input.resident || input.resident[e]) experts.push_back(e);
  }
  return experts;
}

Row eligible_logits(const Gate& gate, const GateInput& input, const Ids& experts, int64_t t) {
  Row row;
  for (int32_t e : experts) {
    row.push_back(static_cast<const double*>(input.logits)[t * gate.num_experts + e]);
  }
  return row;
}

/// Selection scores by position in `experts`.
Row scores_of(const Gate& gate, const GateInput& input, const Ids& experts, const Row& logits) {
  Row scores = scores_are_sigmoids(gate, input.bias) ? sigmoid(logits) : logits;
  for (size_t i = 0; i < experts.size() && input.bias; ++i) {
    scores[i] += static_cast<const double*>(input.bias)[experts[i]];
  }
  return scores;
}

/// Positions in `experts` that a token may choose: all, or those of the best groups.
Ids candidates(const Gate& gate, const Ids& experts, const Row& scores) {
  std::vector<Ids> members(gate.num_groups);
  for (size_t i = 0; i < experts.size(); ++i) {
    members[experts[i] / (gate.num_experts / gate.num_groups)].push_back(static_cast<int32_t>(i));
  }
  Row group_scores(gate.num_groups);
  Ids groups;
  for (int32_t g = 0; g < gate.num_groups; ++g) {
    if (members[g].empty()) continue;
    const Ids best = ranking(scores, members[g]);
    group_scores[g] = scores[best[0]];
    if (gate.group_score == GroupScore::kTop2Sum && best.size() > 1) {
      group_scores[g] += scores[best[1]];
    }
    groups.push_back(g);
  }
  groups = ranking(group_scores, groups);
  groups.resize(std::min<size_t>(groups.size(), gate.top_k_groups));
  std::sort(groups.begin(), groups.end());
  Ids result;
  for (int32_t g : groups) result.insert(result.end(), members[g].begin(), members[g].end());
  return result;
}

Row values_of(const Gate& gate, const Row& logits) {
  if (gate.score == GateScore::kSigmoid) return sigmoid(logits);
  return gate.score == GateScore::kUnit ? Row(logits.size(), 1.0) : softmax(logits);
}

Row probabilities(const Gate& gate, const Row& logits) {
  return gate.score == GateScore::kSigmoid ? shares(sigmoid(logits)) : softmax(logits);
}

Row at(const Row& values, const Ids& positions) {
  Row result;
  for (int32_t position : positions) result.push_back(values[position]);
  return result;
}

/// Weights of the chosen positions before `scale`.
Row weights_of(const Gate& gate, const Row& logits, const Ids& chosen) {
  const bool is_after = gate.score == GateScore::kSoftmax && gate.score_after_top_k;
  const Row values = is_after ? softmax(at(logits, chosen)) : at(values_of(gate, logits), chosen);
  return gate.renormalize ? shares(values) : values;
}

/// d values[i] / d logits[j] for values = softmax(logits).
double softmax_jacobian(const Row& p, size_t i, size_t j) { return p[i] * ((i == j) - p[j]); }

/// d shares[i] / d logits[j] for the shares of sigmoids s.
double sigmoid_share_jacobian(const Row& s, const Row& share, size_t i, size_t j) {
  return share[i] * ((i == j) - share[j]) * (1 - s[j]);
}

/// d weights[i] / d logits[chosen[j]] before `scale`, where they depend on the chosen logits only.
double chosen_jacobian(const Gate& gate, const Row& weights, const Row& s, size_t i, size_t j) {
  if (gate.score == GateScore::kUnit) return 0;
  if (gate.score == GateScore::kSoftmax) return softmax_jacobian(weights, i, j);
  return gate.renormalize ? sigmoid_share_jacobian(s, weights, i, j) : (i == j) * s[i] * (1 - s[i]);
}

}  // namespace

void topk_gate(const Gate& gate, const GateInput& input, const GateResult& result) {
  double* prob_sum = static_cast<double*>(result.prob_sum);
  double& z_sum = *static_cast<double*>(result.z_sum);
  std::fill_n(prob_sum, gate.num_experts, 0.0);
  std::fill_n(result.counts, gate.num_experts, int64_t{0});
  z_sum = 0;
  const Ids experts = eligible_experts(gate, input);
  for (int64_t t = 0; t < gate.num_tokens; ++t) {
    const Row logits = eligible_logits(gate, input, experts, t);
    const Row scores = scores_of(gate, input, experts, logits);
    Ids chosen = ranking(scores, candidates(gate, experts, scores));
    chosen.resize(std::min<size_t>(chosen.size(), gate.top_k));
    const Row weight = weights_of(gate, logits, chosen), p = probabilities(gate, logits);
    for (int64_t k = 0; k < gate.top_k; ++k) {
      const bool is_choice = k < static_cast<int64_t>(chosen.size());
      result.ids[t * gate.top_k + k] = is_choice ? experts[chosen[k]] : -1;
      static_cast<double*>(result.weights)[t * gate.top_k + k] =
          is_choice ? weight[k] * gate.scale : 0;
      if (is_choice) ++result.counts[experts[chosen[k]]];
    }
    for (size_t i = 0; i < experts.size(); ++i) prob_sum[experts[i]] += p[i];
    z_sum += logsumexp(logits) * logsumexp(logits);
  }
}

// The chain rule written out with the full Jacobian of each output.
void topk_gate_backward(const Gate& gate, const GateInput& input, const int32_t* ids,
                        const GateGradient& gradient, double* grad_logits) {
  const double* d_weights = static_cast<const double*>(gradient.weights);
  const double* d_prob_sum = static_cast<const double*>(gradient.prob_sum);
  const double* d_z_sum = static_cast<const double*>(gradient.z_sum);
  const Ids experts = eligible_experts(gate, input);
  const bool is_sigmoid = gate.score == GateScore::kSigmoid;
  const bool is_plain_softmax =
      gate.score == GateScore::kSoftmax && !gate.score_after_top_k && !gate.renormalize;
  std::fill_n(grad_logits, gate.num_tokens * gate.num_experts, 0.0);
  for (int64_t t = 0; t < gate.num_tokens; ++t) {
    const Row logits = eligible_logits(gate, input, experts, t);
    const Row p = probabilities(gate, logits), s = sigmoid(logits), q = softmax(logits);
    Ids chosen, slots;
    for (int32_t k = 0; k < gate.top_k; ++k) {
      const auto found = std::find(experts.begin(), experts.end(), ids[t * gate.top_k + k]);
      if (found == experts.end()) continue;
      chosen.push_back(static_cast<int32_t>(found - experts.begin()));
      slots.push_back(k);
    }
    const Row weights = weights_of(gate, logits, chosen);
    Row d_logits(experts.size(), 0.0);
    for (size_t j = 0; j < experts.size(); ++j) {
      if (d_z_sum) d_logits[j] += *d_z_sum * 2 * logsumexp(logits) * q[j];
      for (size_t i = 0; i < experts.size() && d_prob_sum; ++i) {
        d_logits[j] += d_prob_sum[experts[i]] * (is_sigmoid ? sigmoid_share_jacobian(s, p, i, j)
                                                            : softmax_jacobian(p, i, j));
      }
    }
    for (size_t i = 0; i < chosen.size() && d_weights; ++i) {
      const double d_weight = d_weights[t * gate.top_k + slots[i]] * gate.scale;
      for (size_t j = 0; j < experts.size() && is_plain_softmax; ++j) {
        d_logits[j] += d_weight * softmax_jacobian(p, chosen[i], j);
      }
      for (size_t j = 0; j < chosen.size() && !is_plain_softmax; ++j) {
        d_logits[chosen[j]] += d_weight * chosen_jacobian(gate, weights, at(s, chosen), i, j);
      }
    }
    for (size_t j = 0; j < experts.size(); ++j) {
      grad_logits[t * gate.num_experts + experts[j]] = d_logits[j];
    }
  }
}

}  // namespace fomoe::reference
