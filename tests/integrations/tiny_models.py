# SPDX-License-Identifier: Apache-2.0
"""Random models of every family of the table, at odd sizes; three layers, two with experts."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fomoe.integrations.transformers import replace_moe_blocks

VOCABULARY = 37
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 18,
    "intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
QWEN = {"moe_intermediate_size": 7, "num_experts": 5, "head_dim": 6}
SHARED = {"shared_expert_intermediate_size": 9}
DENSE_FIRST = {"num_hidden_layers": 3, "mlp_only_layers": [0]}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 7,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "n_group": 5,
    "topk_group": 3,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    "num_key_value_heads": 3,
    "q_lora_rank": 7,
    "kv_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 5,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "qwen2_moe": ("Qwen2Moe", QWEN | SHARED | DENSE_FIRST),
    "qwen3_moe": ("Qwen3Moe", QWEN | DENSE_FIRST | {"norm_topk_prob": True}),
    "qwen3_next": (
        "Qwen3Next",
        QWEN
        | SHARED
        | {
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 5,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 5}),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | LATENT),
    "glm4_moe": ("Glm4Moe", DEEPSEEK | {"head_dim": 6, "n_group": 1, "topk_group": 1}),
}


def configuration(name: str, **settings: Any) -> Any:
    """A fresh one: models of one object would share the experts implementation."""
    prefix, own = MODELS[name]
    kind = getattr(transformers, f"{prefix}Config")
    return kind(**COMMON | own | {"experts_implementation": "eager"} | settings)


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    prefix, _ = MODELS[name]
    torch.manual_seed(0)  # Qwen3-Next draws vectors
    model = getattr(transformers, f"{prefix}ForCausalLM")(configuration(name, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=2 * tensor.shape[-1] ** -0.5, generator=generator)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2, generator=generator)
    return model.to(dtype).eval()


def pair(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
    """The model on our ops, and the same as it was."""
    original = tiny_model(name, dtype, **settings)
    replaced = copy.deepcopy(original)
    assert replace_moe_blocks(replaced) == 2
    return replaced, original


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def routers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Router")]
