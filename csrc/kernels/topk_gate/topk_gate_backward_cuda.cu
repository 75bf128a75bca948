// SPDX-License-Identifier: Apache-2.0
// A team of threads owns a token: it reads the token's logits into registers once and writes their
// gradients once. The formulas are those of the CPU kernel.
#include <algorithm>

#include "fomoe/topk_gate.h"
#include "topk_gate/gate_row.cuh"

namespace fomoe::cuda {
namespace {

constexpr int64_t kMostBlocks = 528;  // 4 for each multiprocessor of an H200

template <typename Real>
struct BackwardCall {
  GateRows rows, gradients;
  Gate gate;
  const bool* resident;
  const int32_t* ids;
  const Real *d_weights, *d_prob_sum, *d_z_sum;
  int team_size, packet_bits;
  int64_t team_bytes;
};

/// The thread's values that were chosen, and the gradients of their weights over `scale`.
template <typename Real>
struct ChosenGradients {
  FOMOE_DEVICE bool operator[](int j) const { return bits >> j & 1; }

  uint32_t bits = 0;
  Real values[kValues] = {};
};

/// `slots` [E] in shared memory: which choice an expert was. Wrong ids count as missing.
template <typename Real, typename Team>
FOMOE_DEVICE ChosenGradients<Real> chosen_gradients(const BackwardCall<Real>& call,
                                                    const Team& team, const Layout<Team>& layout,
                                                    Eligible eligible, int64_t token,
                                                    int16_t* slots) {
  ChosenGradients<Real> result;
  if (!call.d_weights) return result;
  const int num_experts = call.rows.num_experts, top_k = static_cast<int>(call.gate.top_k);
  const bool exists = token < call.rows.num_tokens;
  for (int e = team.rank; e < num_experts; e += team.size) slots[e] = -1;
  team.sync();
  for (int k = team.rank; k < top_k && exists; k += team.size) {
    const int32_t id = load_global_once(call.ids + token * top_k + k);
    if (id >= 0 && id < num_experts) slots[id] = static_cast<int16_t>(k);
  }
  team.sync();
  const Real scale = static_cast<Real>(call.gate.scale);
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int slot = eligible[j] ? slots[layout.expert(j)] : -1;
    if (slot < 0) continue;
    result.bits |= 1u << j;
    result.values[j] = load_global_once(call.d_weights + token * top_k + slot) * scale;
  }
  team.sync();
  return result;
}

/// Adds the gradient of weights that depend on the chosen logits only; `values` are the
/// probabilities or the sigmoids.
template <typename Real, typename Team>
FOMOE_DEVICE void add_chosen_gradient(const Gate& gate, const Team& team,
                                      const ChosenGradients<Real>& chosen, const Real (&x)[kValues],
                                      const Real (&values)[kValues], Real (&d_logits)[kValues]) {
  const bool is_after = gate.score == GateScore::kSoftmax && gate.score_after_top_k;
  Real weights[kValues];
  Real largest = -std::numeric_limits<Real>::infinity();
  if (is_after) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) largest = chosen[j] && x[j] > largest ? x[j] : largest;
    largest = largest_of(team, largest);
  }
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    weights[j] = Real(0);
    if (chosen[j]) weights[j] = is_after ? std::exp(x[j] - largest) : values[j];
  }
  Real inner = 0, factor = 1;
  if (weights_are_shares(gate)) {  // moving all values together moves nothing
    Real sum = 0, products = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      sum += weights[j];
      products += chosen[j] ? weights[j] * chosen.values[j] : Real(0);
    }
    sum = sum_over(team, sum);
    factor = Real(1) / (sum == 0 ? Real(1) : sum);
    inner = sum_over(team, products) * factor;
  }
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const Real slope = gate.score == GateScore::kSigmoid ? Real(1) - values[j] : Real(1);
    if (chosen[j]) d_logits[j] += weights[j] * factor * (chosen.values[j] - inner) * slope;
  }
}

/// `probabilities` are the softmax.
template <typename Real, typename Team>
FOMOE_DEVICE void softmax_gradient(const BackwardCall<Real>& call, const Team& team,
                                   const Layout<Team>& layout, Eligible eligible,
                                   const ChosenGradients<Real>& chosen, Real z_factor,
                                   const Real (&x)[kValues], const Real (&probabilities)[kValues],
                                   Real (&d_logits)[kValues]) {
  const Gate& gate = call.gate;
  const bool is_plain = gate.score == GateScore::kSoftmax && !weights_are_shares(gate);
#pragma unroll
  for (int j = 0; j < kValues; ++j) d_logits[j] = 0;
  if (call.d_prob_sum) {
    load_shared_row(call.d_prob_sum, call.rows.num_experts, layout, d_logits);
  }
  Real inner = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    if (is_plain) d_logits[j] += chosen.values[j];
    inner += eligible[j] ? probabilities[j] * d_logits[j] : Real(0);
  }
  inner = sum_over(team, inner);
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    d_logits[j] = probabilities[j] * (d_logits[j] - inner + z_factor);
  }
  if (gate.score == GateScore::kSoftmax && !is_plain) {
    add_chosen_gradient(gate, team, chosen, x, probabilities, d_logits);
  }
}

/// Turns the softmax in `values` into the sigmoids.
template <typename Real, typename Team>
FOMOE_DEVICE void sigmoid_gradient(const BackwardCall<Real>& call, const Team& team,
                                   const Layout<Team>& layout, Eligible eligible,
                                   const ChosenGradients<Real>& chosen, Real z_factor,
                                   const Real (&x)[kValues], Real (&values)[kValues],
                                   Real (&d_logits)[kValues]) {
#pragma unroll
  for (int j = 0; j < kValues; ++j) {  // the softmax may be NaN where the sigmoids are not
    d_logits[j] = z_factor != 0 ? z_factor * values[j] : Real(0);
  }
  const Real sum = sigmoids_of(team, eligible, x, values);
  if (call.d_prob_sum) {
    Real d_prob[kValues] = {};
    load_shared_row(call.d_prob_sum, call.rows.num_experts, layout, d_prob);
    Real inner = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) inner += eligible[j] ? d_prob[j] * values[j] : Real(0);
    inner = sum_over(team, inner) / sum;
    const Real factor = Real(1) / sum;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      d_logits[j] += values[j] * factor * (d_prob[j] - inner) * (Real(1) - values[j]);
    }
  }
  add_chosen_gradient(call.gate, team, chosen, x, values, d_logits);
}

template <typename Real, typename Team>
__global__ void __launch_bounds__(Team::kThreads, kLeastBlocks<Real, Team>)
    gate_backward_kernel(BackwardCall<Real> call) {
  char* memory = &dynamic_shared<char>();
  const Team team(call.team_size, memory);
  const Layout<Team> layout(team, call.packet_bits);
  const Eligible eligible(layout, call.rows.num_experts, call.resident);
  auto* slots = reinterpret_cast<int16_t*>(memory + kScratchBytes + team.index * call.team_bytes);
  const Real d_z_sum = call.d_z_sum ? load_global(call.d_z_sum) : Real(0);
  const int num_teams = Team::kThreads / team.size;
  const int64_t step = static_cast<int64_t>(gridDim.x) * num_teams;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(num_teams); first < call.rows.num_tokens;
       first += step) {
    const int64_t token = first + team.index;
    Real x[kValues], values[kValues], d_logits[kValues];
    load_row(call.rows, token, layout, x);
    const Softmax<Real> softmax = softmax_of(team, eligible, x, values);
    const Real factor = Real(1) / softmax.sum;
#pragma unroll
    for (int j = 0; j < kValues; ++j) values[j] *= factor;
    const Real z_factor = call.d_z_sum ? Real(2) * d_z_sum * softmax.logsumexp : Real(0);
    const ChosenGradients<Real> chosen =
        chosen_gradients(call, team, layout, eligible, token, slots);
    if (call.gate.score == GateScore::kSigmoid) {
      sigmoid_gradient(call, team, layout, eligible, chosen, z_factor, x, values, d_logits);
    } else {
      softmax_gradient(call, team, layout, eligible, chosen, z_factor, x, values, d_logits);
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) d_logits[j] = eligible[j] ? d_logits[j] : Real(0);
    store_row(call.gradients, token, layout, d_logits);
  }
}

template <typename Real, typename Team>
void launch_backward(BackwardCall<Real> call, Stream stream) {
  call.team_size = Team::size_for(call.gate.num_experts);
  call.team_bytes = ceil_div(2 * call.gate.num_experts, 16) * 16;
  const int num_teams = Team::teams_per_block(call.team_size);
  const int64_t blocks = std::min(ceil_div(call.gate.num_tokens, num_teams), kMostBlocks);
  launch(
      {"topk_gate_backward", blocks, Team::kThreads, kScratchBytes + num_teams * call.team_bytes},
      stream, gate_backward_kernel<Real, Team>, call);
}

template <typename Real>
void run_backward(DType dtype, const Gate& gate, const GateInput& input, const int32_t* ids,
                  const GateGradient& gradient, void* grad_logits, Stream stream) {
  const GateRows rows(dtype, input.logits, gate), gradients(dtype, grad_logits, gate);
  const BackwardCall<Real> call = {rows,
                                   gradients,
                                   gate,
                                   input.resident,
                                   ids,
                                   static_cast<const Real*>(gradient.weights),
                                   static_cast<const Real*>(gradient.prob_sum),
                                   static_cast<const Real*>(gradient.z_sum),
                                   0,
                                   packet_bits_of(dtype, rows.is_aligned && gradients.is_aligned),
                                   0};
  if (gate.num_experts <= WarpTeam::kMostExperts) {
    launch_backward<Real, WarpTeam>(call, stream);
  } else {
    launch_backward<Real, BlockTeam>(call, stream);
  }
}

}  // namespace

int64_t topk_gate_backward_workspace_bytes(DType, const Gate&) { return 0; }

void topk_gate_backward(DType dtype, const Gate& gate, const GateInput& input, const int32_t* ids,
                        const GateGradient& gradient, void* grad_logits, void* /*workspace*/,
                        Stream stream) {
  if (dtype == DType::kFloat64) {
    run_backward<double>(dtype, gate, input, ids, gradient, grad_logits, stream);
  } else {
    run_backward<float>(dtype, gate, input, ids, gradient, grad_logits, stream);
  }
}

}  // namespace fomoe::cuda
