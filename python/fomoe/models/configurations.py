# SPDX-License-Identifier: Apache-2.0
"""Named model shapes: five sizes of FoMoE, two of FoE, and our own.

Sources: arXiv 2606.19025, Table 1; arXiv 2605.06206, Table 8.
"""

from fomoe.models.decoder_config import DecoderConfig
from fomoe.models.foe import FoEConfig
from fomoe.models.language_model_config import LanguageModelConfig, RopeScaling

GPT_OSS_VOCAB_SIZE = 200_019
OLMOE_VOCAB_SIZE = 50_304
COMPLETE_P_BASE_DEPTH = 4  # our choice: the depth of the paper's smallest model


def _fomoe(dim: int, num_layers: int) -> DecoderConfig:
    """A row of Table 1; everything follows from width and depth.

    The paper scales each block's output by CompleteP's depth multiplier without giving its base
    depth.
    """
    num_experts = 4 * dim // 128
    return DecoderConfig(
        vocab_size=GPT_OSS_VOCAB_SIZE,
        dim=dim,
        num_layers=num_layers,
        num_heads=dim // 64,
        num_kv_heads=dim // 64,
        head_dim=64,
        expert_dim=128,
        num_experts=num_experts,
        top_k=num_experts // 4,
        activation="silu",
        score="sigmoid",
        norm="peri",
        residual_scale=COMPLETE_P_BASE_DEPTH / num_layers,
    )


def _foe(dim: int, num_heads: int, head_dim: int) -> FoEConfig:
    """A column of Table 8: trained on 2048 positions, meant for 32768 by a factor 16.

    Embeddings are apart, for only then the paper's totals come out. The norms are our choice.
    """
    return FoEConfig(
        vocab_size=OLMOE_VOCAB_SIZE,
        dim=dim,
        num_layers=16,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        expert_dim=dim // 2,
        num_experts=64,
        top_k=8,
        norm="peri",
        tie_embeddings=False,
        rope_theta=5e5,
        rope_scaling=RopeScaling(kind="linear", factor=16.0),
        context_length=32768,
    )


CONFIGURATIONS: dict[str, LanguageModelConfig] = {
    # For tests and demonstrations: byte tokens, experts are most of it.
    "tiny": DecoderConfig(
        vocab_size=256,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        expert_dim=64,
        num_experts=16,
        top_k=4,
        activation="silu",
        score="sigmoid",
        norm="peri",
    ),
    # The shape most models of today share: byte tokens, pre-norm, grouped heads, gated experts.
    "small-swiglu": DecoderConfig(
        vocab_size=256,
        dim=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        expert_dim=128,
        num_experts=32,
        top_k=4,
        renormalize=True,
        tie_embeddings=False,
    ),
    "fomoe-54m": _fomoe(dim=256, num_layers=4),
    "fomoe-153m": _fomoe(dim=512, num_layers=16),
    "fomoe-1.8b": _fomoe(dim=1024, num_layers=128),
    "fomoe-13b": _fomoe(dim=2048, num_layers=256),
    "fomoe-104b": _fomoe(dim=4096, num_layers=512),
    "foe-1b": _foe(dim=768, num_heads=8, head_dim=96),
    "foe-7b": _foe(dim=2048, num_heads=16, head_dim=128),
}


def configuration(name: str) -> LanguageModelConfig:
    """The configuration of that name.

    Raises
    ------
    ValueError
        If there is none; the message lists the names.
    """
    if name not in CONFIGURATIONS:
        names = ", ".join(CONFIGURATIONS)
        raise ValueError(f"configuration: expected one of {names}, got {name!r}")
    return CONFIGURATIONS[name]
