# SPDX-License-Identifier: Apache-2.0
"""What a decoder computes for a token, and how much faster a step can get by computing less."""

from dataclasses import dataclass

from fomoe.models import DecoderConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class Flops:
    """FLOPs of the matrix products of one token's forward, by part. A backward takes twice that."""

    attention: int  # projections and scores
    router: int
    experts: int
    dense: int  # feed-forward blocks of dense layers
    unembedding: int

    @property
    def total(self) -> int:
        return self.attention + self.router + self.experts + self.dense + self.unembedding

    @property
    def expert_share(self) -> float:
        """Of a training step."""
        return self.experts / self.total

    @property
    def expert_share_of_layer(self) -> float:
        """Of the Mixture-of-Experts layer, router and experts."""
        return self.experts / (self.router + self.experts)


def decoder_flops(config: DecoderConfig, sequence_length: int) -> Flops:
    """Count the products of ``Decoder(config)`` without ghosts.

    Attention is causal: a position sees (S + 1) / 2 keys on average. Products only: no norms, no
    softmax, no optimizer.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # query, output; key, value
    projections = 2 * config.dim * config.head_dim * heads
    scores = 2 * config.num_heads * config.head_dim * (sequence_length + 1)
    num_matrices = 2 if config.activation == "silu" else 3
    experts = 2 * num_matrices * config.top_k * config.dim * config.expert_dim
    num_moe = len(config.moe_layers)
    return Flops(
        attention=config.num_layers * (projections + scores),
        router=num_moe * 2 * config.dim * config.num_experts,
        experts=num_moe * experts,
        dense=len(config.dense_layers) * 6 * config.dim * config.dense_dim,
        unembedding=2 * config.dim * config.vocab_size,
    )


def ideal_speedup(expert_share: float, ghost_share: float) -> float:
    """1 / (1 - f * g): how many times faster, if time were FLOPs and ghosts cost nothing."""
    return 1 / (1 - expert_share * ghost_share)
