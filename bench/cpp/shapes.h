// SPDX-License-Identifier: Apache-2.0
// Layers of published models, by name.
#pragma once

#include <cstdint>
#include <string>

#include "fomoe/expert_mlp.h"
#include "fomoe/topk_gate.h"

namespace bench {

/// A Mixture-of-Experts layer and the tokens it is measured with.
struct Shape {
  std::string name;
  int64_t tokens;       // T
  int64_t dim;          // H
  int64_t expert_dim;   // I
  int64_t num_experts;  // E
  int64_t top_k;        // K
  fomoe::Activation activation = fomoe::Activation::kSwiglu;
  fomoe::GateScore score = fomoe::GateScore::kSoftmax;
  int64_t num_groups = 1;
  int64_t top_k_groups = 1;
  double scale = 1.0;

  int64_t num_rows() const { return tokens * top_k; }  // R
  int64_t pre_dim() const { return is_gated(activation) ? 2 * expert_dim : expert_dim; }
};

inline const Shape kShapes[] = {
    {"qwen3-30b", 32768, 2048, 768, 128, 8},
    {"olmoe", 32768, 2048, 1024, 64, 8},
    // One of eight ranks of an expert-parallel group.
    {"deepseek-v3-slice", 16384, 7168, 2048, 32, 8},
    {"sonicmoe-7b-n256", 24576, 1536, 256, 128, 8},
    {"gpt-oss-20b", 16384, 2880, 2880, 32, 4, fomoe::Activation::kSwigluClamped},
    {"qwen3-next", 32768, 2048, 512, 512, 10},
    {"mixtral-8x7b", 16384, 4096, 14336, 8, 2},
    {"moonlight", 32768, 2048, 1408, 64, 6},
    {"deepseek-v3", 16384, 7168, 2048, 256, 8, fomoe::Activation::kSwiglu,
     fomoe::GateScore::kSigmoid, 8, 4, 2.5},
    {"sonicmoe-1.4b-n256", 40960, 768, 256, 128, 8},
    {"sonicmoe-1.4b-n512", 40960, 768, 512, 64, 4},
    {"sonicmoe-1.4b-n1024", 40960, 768, 1024, 32, 2},
    {"sonicmoe-7b-n512", 24576, 1536, 512, 64, 4},
    {"sonicmoe-7b-n1024", 24576, 1536, 1024, 32, 2},
    {"sonicmoe-30b-n256", 32768, 4096, 256, 256, 16},
    {"sonicmoe-30b-n512", 32768, 4096, 512, 128, 8},
    {"sonicmoe-30b-n1024", 32768, 4096, 1024, 64, 4},
    {"sonicmoe-120b-n512", 32768, 4096, 512, 256, 16},
    {"sonicmoe-120b-n1024", 32768, 4096, 1024, 128, 8},
    {"sonicmoe-120b-n2048", 32768, 4096, 2048, 64, 4},
    {"megablocks-xs", 65536, 512, 2048, 64, 1, fomoe::Activation::kSilu},
    {"megablocks-small", 32768, 768, 3072, 64, 1, fomoe::Activation::kSilu},
    {"megablocks-medium", 8192, 1024, 4096, 64, 1, fomoe::Activation::kSilu},
    // No model's: runs in a moment, with sizes that fit no tile.
    {"tiny", 40, 24, 16, 8, 2},
};

/// Measured when no shape is named: the first so many.
inline constexpr int kNumDefaultShapes = 5;

}  // namespace bench
