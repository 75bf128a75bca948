// SPDX-License-Identifier: Apache-2.0
// A team of threads owns a token: it reads the token's logits into registers once, and all else
// follows from these. A block owns a run of tokens, and keeps the sums over them.
#include <algorithm>

#include "fomoe/topk_gate.h"
#include "topk_gate/gate_sums.cuh"
#include "topk_gate/select_block.cuh"
#include "topk_gate/select_sorted.cuh"

namespace fomoe::cuda {
namespace {

constexpr int64_t kMostBlocks = 528;      // 4 for each multiprocessor of an H200
constexpr int64_t kMostWarpChoices = 32;  // beyond it, sorting beats choosing one after the other

/// A block's shared memory, as offsets in bytes.
struct GateShared {
  template <typename Real, typename Team>
  void lay_out(const Gate& gate, int num_teams) {
    const int num_experts = static_cast<int>(gate.num_experts);
    z_sums = take(kScratchBytes);
    counts = take(num_teams * static_cast<int64_t>(sizeof(double)));
    prob_sums = take(num_experts * static_cast<int64_t>(sizeof(int32_t)));
    const bool adds_teams = num_teams > 1;
    const Team* kind = nullptr;
    selection = take(adds_teams ? num_experts * static_cast<int64_t>(sizeof(Real)) : 0);
    teams = take(block_selection_bytes<Real>(kind));
    team_bytes = selection_bytes<Real>(kind, gate);
    if (gate.top_k_groups < gate.num_groups) {
      const int num_groups = static_cast<int>(gate.num_groups);
      team_bytes = std::max(team_bytes, GroupTables<Real>::bytes(num_experts, num_groups));
    }
    team_bytes = ceil_div(team_bytes, 16) * 16;
    take(num_teams * team_bytes);
  }

  int64_t take(int64_t size) {
    bytes += ceil_div(size, 16) * 16;
    return bytes;
  }

  int64_t z_sums, counts, prob_sums, selection, teams, team_bytes, bytes = 0;
};

template <typename Real>
struct GateCall {
  GateRows rows;
  Gate gate;
  bool of_sigmoid;
  const Real* bias;
  const bool* resident;
  int32_t* ids;
  Real* weights;
  int64_t tokens_per_block;
  int team_size, packet_bits;
  GateShared shared;
};

/// What the experts of a token are chosen by; `values` are the sigmoids if those are needed.
template <typename Real, typename Team>
FOMOE_DEVICE void fill_keys(const GateCall<Real>& call, const Layout<Team>& layout,
                            Eligible eligible, const Real (&x)[kValues],
                            const Real (&values)[kValues], Key<Real> (&keys)[kValues]) {
  Real bias[kValues] = {};
  if (call.bias) load_shared_row(call.bias, call.rows.num_experts, layout, bias);
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const Real score = (call.of_sigmoid ? values[j] : x[j]) + bias[j];
    keys[j] = eligible[j] ? key_of(score) : kNoKey<Real>;
  }
}

template <typename Real>
FOMOE_DEVICE Real chosen_value(const Gate& gate, const Softmax<Real>& softmax, Real largest,
                               Real logit) {
  if (gate.score == GateScore::kUnit) return 1;
  if (gate.score == GateScore::kSigmoid) return sigmoid(logit);
  if (gate.score_after_top_k) return std::exp(logit - largest);
  return std::exp(logit - softmax.shift) / softmax.sum;
}

/// Replaces the logits of the choices by their weights.
template <typename Real, typename Team>
FOMOE_DEVICE void weigh(const Gate& gate, const Team& team, const Softmax<Real>& softmax,
                        const Choices<Real>& choices) {
  const int top_k = static_cast<int>(gate.top_k);
  Real largest = -std::numeric_limits<Real>::infinity();
  if (gate.score_after_top_k) {
    for (int k = team.rank; k < top_k; k += team.size) {
      const Real logit = choices.logits[k];
      if (choices.ids[k] >= 0 && logit > largest) largest = logit;
    }
    largest = largest_of(team, largest);
  }
  Real sum = 0;
  for (int k = team.rank; k < top_k; k += team.size) {
    const bool is_chosen = choices.ids[k] >= 0;
    const Real value =
        is_chosen ? chosen_value(gate, softmax, largest, choices.logits[k]) : Real(0);
    choices.logits[k] = value;
    sum += value;
  }
  Real divisor = 1;
  if (weights_are_shares(gate)) {
    sum = sum_over(team, sum);
    divisor = sum == 0 ? Real(1) : sum;
  }
  const Real scale = static_cast<Real>(gate.scale);
  for (int k = team.rank; k < top_k; k += team.size) {
    const Real weight = choices.logits[k] / divisor * scale;
    choices.logits[k] = choices.ids[k] >= 0 ? weight : Real(0);
  }
}

template <typename Real, typename Team>
FOMOE_DEVICE void write_choices(const GateCall<Real>& call, const Team& team, int64_t token,
                                const Choices<Real>& choices, int32_t* counts) {
  const int top_k = static_cast<int>(call.gate.top_k);
  if (token >= call.rows.num_tokens) return;
  for (int k = team.rank; k < top_k; k += team.size) {
    const int32_t id = choices.ids[k];
    store_global(call.ids + token * top_k + k, id);
    store_global(call.weights + token * top_k + k, choices.logits[k]);
    if (id >= 0) atomicAdd(counts + id, 1);
  }
}

/// Leaves the block's sums in the workspace.
template <typename Real, typename Team>
FOMOE_DEVICE void write_sums(const GateCall<Real>& call, const Team& team,
                             const Layout<Team>& layout, Eligible eligible,
                             const Real (&prob_sums)[kValues], double z_sum, char* memory,
                             const GateSums<Real>& sums) {
  auto* z_sums = reinterpret_cast<double*>(memory + call.shared.z_sums);
  const auto* counts = reinterpret_cast<const int32_t*>(memory + call.shared.counts);
  auto* prob_sum = reinterpret_cast<Real*>(memory + call.shared.prob_sums);
  const int num_experts = call.rows.num_experts, threads = Team::kThreads;
  const int thread = static_cast<int>(threadIdx.x), num_teams = threads / team.size;
  const int64_t first = blockIdx.x * static_cast<int64_t>(num_experts);
  if (team.rank == 0) z_sums[team.index] = z_sum;

  // One team after the other; the teams of a warp first add up among themselves.
  const int teams_per_warp = std::max(1, num_teams * kWarpSize / threads);
  for (int adding = 0; adding < num_teams; adding += teams_per_warp) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      Real sum = eligible[j] ? prob_sums[j] : Real(0);
      for (int distance = team.size; distance < kWarpSize; distance *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      const int expert = layout.expert(j);
      if (team.index != adding || expert >= num_experts) continue;
      if (num_teams == 1) {
        store_global(sums.prob_sum + first + expert, sum);
      } else {
        prob_sum[expert] = adding == 0 ? sum : prob_sum[expert] + sum;
      }
    }
    __syncthreads();
  }
  for (int e = thread; e < num_experts; e += threads) {
    store_global(sums.counts + first + e, counts[e]);
    if (num_teams > 1) store_global(sums.prob_sum + first + e, prob_sum[e]);
  }
  if (thread == 0) {
    double sum = 0;
    for (int i = 0; i < num_teams; ++i) sum += z_sums[i];
    store_global(sums.z_sum + blockIdx.x, sum);
  }
}

template <typename Real, typename Team>
__global__ void __launch_bounds__(Team::kThreads, kLeastBlocks<Real, Team>)
    gate_kernel(GateCall<Real> call, GateSums<Real> sums) {
  const Gate& gate = call.gate;
  char* memory = &dynamic_shared<char>();
  const Team team(call.team_size, memory);
  const Layout<Team> layout(team, call.packet_bits);
  const Eligible all(layout, call.rows.num_experts, call.resident);
  const bool has_eligible = largest_of(team, static_cast<int>(all.bits)) != 0;
  auto* counts = reinterpret_cast<int32_t*>(memory + call.shared.counts);
  char* team_memory = memory + call.shared.teams + team.index * call.shared.team_bytes;
  for (int e = threadIdx.x; e < call.rows.num_experts; e += Team::kThreads) counts[e] = 0;
  __syncthreads();

  Real prob_sums[kValues] = {};
  double z_sum = 0;
  const int64_t begin = blockIdx.x * call.tokens_per_block;
  const int64_t end = std::min(begin + call.tokens_per_block, call.rows.num_tokens);
  for (int64_t first = begin; first < end; first += Team::kThreads / team.size) {
    const int64_t token = first + team.index;
    const bool exists = token < end;
    Eligible eligible = all;
    if (!exists) eligible.bits = 0;
    Real x[kValues], values[kValues];
    load_row(call.rows, token, layout, x);
    const Softmax<Real> softmax = softmax_of(team, eligible, x, values);
    Real sum = softmax.sum;
    if (gate.score == GateScore::kSigmoid) sum = sigmoids_of(team, eligible, x, values);
    if (exists && has_eligible) {
      const Real factor = Real(1) / sum;
#pragma unroll
      for (int j = 0; j < kValues; ++j) prob_sums[j] += values[j] * factor;
      z_sum += static_cast<double>(softmax.logsumexp) * softmax.logsumexp;
    }
    Key<Real> keys[kValues];
    fill_keys(call, layout, eligible, x, values, keys);
    if (gate.top_k_groups < gate.num_groups) {
      const GroupTables<Real> tables(team_memory, call.rows.num_experts,
                                     static_cast<int>(gate.num_groups));
      keep_best_groups(gate, team, layout, tables, keys);
    }
    const Choices<Real> choices =
        select(gate, team, layout, keys, x, team_memory, memory + call.shared.selection);
    weigh(gate, team, softmax, choices);
    write_choices(call, team, token, choices, counts);
    team.sync();
  }
  __syncthreads();
  write_sums(call, team, layout, all, prob_sums, z_sum, memory, sums);
}

/// How the tokens are split among blocks.
struct Split {
  explicit Split(const Gate& gate) {
    uses_warps = gate.num_experts <= WarpTeam::kMostExperts && gate.top_k <= kMostWarpChoices;
    team_size = uses_warps ? WarpTeam::size_for(gate.num_experts) : BlockTeam::kThreads;
    num_teams = uses_warps ? WarpTeam::teams_per_block(team_size) : 1;
    tokens_per_block = ceil_div(ceil_div(gate.num_tokens, kMostBlocks), num_teams) * num_teams;
    num_blocks = gate.num_tokens == 0 ? 0 : ceil_div(gate.num_tokens, tokens_per_block);
  }

  bool uses_warps;
  int team_size, num_teams;
  int64_t tokens_per_block, num_blocks;
};

template <typename Real, typename Team>
void launch_gate(GateCall<Real> call, const Split& split, const GateSums<Real>& sums,
                 Stream stream) {
  call.shared.template lay_out<Real, Team>(call.gate, split.num_teams);
  launch({"topk_gate", split.num_blocks, Team::kThreads, call.shared.bytes}, stream,
         gate_kernel<Real, Team>, call, sums);
}

template <typename Real>
void run_gate(DType dtype, const Gate& gate, const GateInput& input, const GateResult& result,
              void* workspace, Stream stream) {
  const Split split(gate);
  Workspace memory(workspace);
  const GateSums<Real> sums(split.num_blocks, gate.num_experts, memory);
  const GateRows rows(dtype, input.logits, gate);
  const GateCall<Real> call = {rows,
                               gate,
                               scores_are_sigmoids(gate, input.bias != nullptr),
                               static_cast<const Real*>(input.bias),
                               input.resident,
                               result.ids,
                               static_cast<Real*>(result.weights),
                               split.tokens_per_block,
                               split.team_size,
                               packet_bits_of(dtype, rows.is_aligned),
                               {}};
  if (split.uses_warps) {
    launch_gate<Real, WarpTeam>(call, split, sums, stream);
  } else {
    launch_gate<Real, BlockTeam>(call, split, sums, stream);
  }
  launch_gate_sums(sums, result, stream);
}

}  // namespace

int64_t topk_gate_workspace_bytes(DType dtype, const Gate& gate) {
  Workspace workspace(nullptr);
  dispatch(dtype, [&](auto element) {
    const GateSums<Accumulate<decltype(element)>> sums(Split(gate).num_blocks, gate.num_experts,
                                                       workspace);
  });
  return workspace.bytes();
}

void topk_gate(DType dtype, const Gate& gate, const GateInput& input, const GateResult& result,
               void* workspace, Stream stream) {
  if (dtype == DType::kFloat64) {
    run_gate<double>(dtype, gate, input, result, workspace, stream);
  } else {
    run_gate<float>(dtype, gate, input, result, workspace, stream);
  }
}

}  // namespace fomoe::cuda
