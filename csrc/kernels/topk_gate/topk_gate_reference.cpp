// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "fomoe/topk_gate.h"

namespace fomoe::reference {
namespace {

using Row = std::vector<double>;

bool is_better(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return !std::isnan(a);
  return a > b;
}

bool is_tie(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

std::vector<int32_t> ranking(const Row& logits) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return !is_tie(logits[a], logits[b]) && is_better(logits[a], logits[b]);
  });
  return order;
}

double largest(const Row& logits) {
  double result = -INFINITY;
  for (double logit : logits) result = std::isnan(logit) ? result : std::max(result, logit);
  return result;
}

double total(const Row& row) { return std::accumulate(row.begin(), row.end(), 0.0); }

double logsumexp(const Row& logits) {
  const double shift = largest(logits);
  double sum = 0;
  for (double logit : logits) sum += logit == shift ? 1.0 : std::exp(logit - shift);
  return shift + std::log(sum);
}

Row softmax(const Row& logits) {
  Row result = logits;
  for (double& value : result) value = std::exp(value - largest(logits));
  const double sum = total(result);
  for (double& value : result) value /= sum;
  return result;
}

Row sigmoid(const Row& logits) {
  Row result = logits;
  for (double& value : result) value = 1 / (1 + std::exp(-value));
  return result;
}

Row row_of(const Gate& gate, const double* logits, int64_t t) {
  return Row(logits + t * gate.num_experts, logits + (t + 1) * gate.num_experts);
}

double chosen_sum(const Gate& gate, const Row& values, const int32_t* ids) {
  double sum = 0;
  for (int64_t k = 0; k < gate.top_k; ++k) sum += values[ids[k]];
  return sum;
}

}  // namespace

void topk_gate(const Gate& gate, const double* logits, const GateResult& result) {
  double* prob_sum = static_cast<double*>(result.prob_sum);
  double& z_sum = *static_cast<double*>(result.z_sum);
  std::fill_n(prob_sum, gate.num_experts, 0.0);
  std::fill_n(result.counts, gate.num_experts, int64_t{0});
  z_sum = 0;
  for (int64_t t = 0; t < gate.num_tokens; ++t) {
    const Row row = row_of(gate, logits, t);
    const bool is_softmax = gate.score == GateScore::kSoftmax;
    const Row values = is_softmax ? softmax(row) : sigmoid(row);
    int32_t* ids = result.ids + t * gate.top_k;
    double* weights = static_cast<double*>(result.weights) + t * gate.top_k;
    std::copy_n(ranking(row).begin(), gate.top_k, ids);
    const double divisor = gate.renormalize ? chosen_sum(gate, values, ids) : 1.0;
    for (int64_t k = 0; k < gate.top_k; ++k) {
      ++result.counts[ids[k]];
      weights[k] = values[ids[k]] / divisor * gate.scale;
    }
    const double all = is_softmax ? 1.0 : total(values);
    for (int64_t e = 0; e < gate.num_experts; ++e) prob_sum[e] += values[e] / all;
    z_sum += logsumexp(row) * logsumexp(row);
  }
}

// The chain rule written out with the full Jacobian of each step.
void topk_gate_backward(const Gate& gate, const double* logits, const int32_t* ids,
                        const GateGradient& gradient, double* grad_logits) {
  const double* d_weights = static_cast<const double*>(gradient.weights);
  const double* d_prob_sum = static_cast<const double*>(gradient.prob_sum);
  const double* d_z_sum = static_cast<const double*>(gradient.z_sum);
  const int64_t num_experts = gate.num_experts, top_k = gate.top_k;
  for (int64_t t = 0; t < gate.num_tokens; ++t) {
    const Row row = row_of(gate, logits, t);
    const bool is_softmax = gate.score == GateScore::kSoftmax;
    const Row values = is_softmax ? softmax(row) : sigmoid(row);
    const double all = is_softmax ? 1.0 : total(values);
    Row d_values(num_experts, 0.0);
    for (int64_t e = 0; e < num_experts && d_prob_sum; ++e) {
      for (int64_t f = 0; f < num_experts; ++f) {
        const double jacobian = is_softmax ? e == f : ((e == f) - values[f] / all) / all;
        d_values[e] += d_prob_sum[f] * jacobian;
      }
    }
    const double divisor = gate.renormalize ? chosen_sum(gate, values, ids + t * top_k) : 1.0;
    for (int64_t k = 0; k < top_k && d_weights; ++k) {
      for (int64_t j = 0; j < top_k; ++j) {
        const double share = gate.renormalize ? values[ids[t * top_k + j]] / divisor : 0.0;
        d_values[ids[t * top_k + k]] +=
            d_weights[t * top_k + j] * gate.scale * ((j == k) - share) / divisor;
      }
    }
    const Row p = softmax(row);
    for (int64_t e = 0; e < num_experts; ++e) {
      double d_logit = d_z_sum ? *d_z_sum * 2 * logsumexp(row) * p[e] : 0.0;
      for (int64_t f = 0; f < num_experts; ++f) {
        const double jacobian = is_softmax ? values[f] * ((e == f) - values[e])
                                           : (e == f) * values[e] * (1 - values[e]);
        d_logit += d_values[f] * jacobian;
      }
      grad_logits[t * num_experts + e] = d_logit;
    }
  }
}

}  // namespace fomoe::reference
