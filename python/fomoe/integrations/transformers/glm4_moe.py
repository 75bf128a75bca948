# SPDX-License-Identifier: Apache-2.0
"""A converted decoder as a GLM-4-MoE, which transformers runs without any code of ours.

Its router has unit gates in the limit only. With e = ``EPSILON`` it scores s = sigmoid(e * logit),
adds e / 4 * bias to choose, and weighs by top_k * s / (sum of the chosen s): since
s = 1/2 + e/4 * logit - ..., the choice is by logit + bias, and the weights are
1 + e/2 * (logit - mean logit of the chosen). In float32, biased logits that differ by less than
2e-4 may change places. Both are less than what bfloat16 rounds off. Our choice.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from fomoe.errors import UserError
from fomoe.models import Decoder, DecoderConfig
from fomoe.models.pretrained.weights import parts_by_their_name

__all__ = ["EPSILON", "glm4_moe"]

EPSILON = 2.0**-10  # a power of 2 changes no digit of a weight
_NEEDED: dict[str, Any] = {
    "score": "unit",
    "activation": "swiglu",
    "router": "full",
    "num_groups": 1,
    "capacity_factor": None,
    "shared_expert_gate": False,
    "norm": "pre",
    "residual_scale": 1.0,
    "attention_output_bias": False,
    "sliding_window": 0,
}


def glm4_moe(model: Decoder) -> Glm4MoeForCausalLM:
    """The same function within the tolerance above, on the weights of ``model`` themselves.

    Raises
    ------
    UserError
        For a setting that this architecture has not.
    """
    config = _config(model.config)
    with torch.device("meta"):
        theirs = Glm4MoeForCausalLM(config)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state |= _theirs(name, parameter.detach())
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in model.config.moe_layers:
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        state.setdefault(name, torch.zeros(model.config.num_experts))
        if model.config.shared_expert_dim == 0:
            prefix = f"model.layers.{layer}.mlp.shared_experts"
            for part in ("gate", "up"):
                state[f"{prefix}.{part}_proj.weight"] = torch.zeros(0, model.config.dim)
            state[f"{prefix}.down_proj.weight"] = torch.zeros(model.config.dim, 0)
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    # Angles are no part of the state.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    return theirs.eval()


def _config(config: DecoderConfig) -> Glm4MoeConfig:
    for name, needed in _NEEDED.items():
        value = getattr(config, name)
        if value != needed:
            raise UserError(f"glm4-moe: {name}: expected {needed!r}, got {value!r}")
    num_dense = len(config.dense_layers)
    if config.dense_layers != tuple(range(num_dense)) or not config.moe_layers:
        raise UserError(
            "glm4-moe: dense_layers: expected the first layers and not all of them, "
            f"got {config.dense_layers}"
        )
    if config.shared_expert_dim % config.expert_dim:
        raise UserError(
            f"glm4-moe: shared_expert_dim: expected a multiple of expert_dim = "
            f"{config.expert_dim}, got {config.shared_expert_dim}"
        )
    return Glm4MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.dense_dim or config.expert_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length or 4096,
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=_rope(config),
        attention_bias=config.qkv_bias,
        use_qk_norm=config.head_norm,
        moe_intermediate_size=config.expert_dim,
        num_experts_per_tok=config.top_k,
        n_shared_experts=config.shared_expert_dim // config.expert_dim,
        n_routed_experts=config.num_experts,
        routed_scaling_factor=config.top_k * config.scale,
        first_k_dense_replace=num_dense,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
    )


def _rope(config: DecoderConfig) -> dict[str, Any]:
    common: dict[str, Any] = {"rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    scaling = config.rope_scaling
    if scaling is None:
        return common | {"rope_type": "default"}
    common |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return common
    return common | {
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _theirs(name: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter by their names; the first matrix of a SwiGLU becomes two outside of experts."""
    prefix, _, part = name.partition(".moe.")
    block = f"model.{prefix}.mlp"
    match part:
        case "router.weight":
            return {f"{block}.gate.weight": EPSILON * value}
        case "router.bias":
            return {f"{block}.gate.e_score_correction_bias": EPSILON / 4 * value.float()}
        case "experts.w1":
            return {f"{block}.experts.gate_up_proj": value}
        case "experts.w2":
            return {f"{block}.experts.down_proj": value}
        case "shared_expert.w1":
            gate, up = value.chunk(2)
            shared = f"{block}.shared_experts"
            return {f"{shared}.gate_proj.weight": gate, f"{shared}.up_proj.weight": up}
        case "shared_expert.w2":
            return {f"{block}.shared_experts.down_proj.weight": value}
        case _:
            return parts_by_their_name(name, value)
