# SPDX-License-Identifier: Apache-2.0
"""What all model families have in common: tokens to hidden vectors, and these to logits.

B batch, S sequence, V vocabulary, D model width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe.models.attention import rotation
from fomoe.models.cache import KeyValueCache, StepView
from fomoe.models.language_model_config import LanguageModelConfig
from fomoe.models.normalization import RMSNorm

__all__ = ["LanguageModel", "peri_norm"]


class LanguageModel(nn.Module):
    """An embedding, layers, a norm and an unembedding; subclasses say what a layer is.

    Weights are random after construction; :func:`fomoe.nn.initialize` sets them from a seed. With
    the attribute ``gradient_checkpointing`` set, training keeps each layer's input alone and
    computes the layer again in the backward.

    Parameters
    ----------
    config : LanguageModelConfig
    layers : Sequence[nn.Module]
        Each takes its input, the positions' rotation, and its part of a step of the cache or None.
    num_kv_heads : int
        Of the heads' keys and values, those that are computed and kept here.
    """

    def __init__(
        self, config: LanguageModelConfig, layers: Sequence[nn.Module], num_kv_heads: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_kv_heads = num_kv_heads
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.embedding_norm = peri_norm(config)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.dim, config.norm_epsilon)
        if not config.tie_embeddings:
            self.unembedding = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of the token that follows each position.

        Parameters
        ----------
        tokens_BS : Tensor, (B, S), int64
            Token ids in [0, V).

        Returns
        -------
        Tensor, (B, S, V), dtype of the weights, or the autocast dtype

        Raises
        ------
        ValueError
            If the tokens are not two-dimensional int64.
        """
        return self.unembed(self.hidden(tokens_BS))

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """Room for ``batch_size`` sequences of at most ``capacity`` tokens."""
        config, weight = self.config, self.embedding.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KeyValueCache(
            config.num_layers,
            batch_size,
            self.num_kv_heads,
            capacity,
            config.head_dim,
            dtype=dtype,
            device=weight.device,
        )

    def hidden(self, tokens_BS: Tensor, cache: StepView | None = None) -> Tensor:
        """What :meth:`unembed` makes logits of, (B, S, D).

        With a step of a cache the tokens follow those of earlier steps, S is the step's number of
        tokens, and what belongs to padding means nothing.
        """
        if tokens_BS.dim() != 2 or tokens_BS.dtype != torch.int64:
            raise ValueError(
                f"{type(self).__name__}: expected tokens of shape (B, S) and dtype torch.int64, "
                f"got {tuple(tokens_BS.shape)} and {tokens_BS.dtype}"
            )
        x_BSD: Tensor = self.embedding_norm(self.embedding(tokens_BS))
        positions = rotation(
            tokens_BS.shape[1] if cache is None else cache.num_visible,
            self.config.head_dim,
            self.config.rope_theta,
            scaling=self.config.rope_scaling,
            dtype=torch.promote_types(x_BSD.dtype, torch.float32),
            device=x_BSD.device,
        )
        if cache is not None:
            positions = positions.at(cache.positions_BS)
        x = self._enter_layers(x_BSD)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            step = None if cache is None else cache.layer(index)
            if again:
                x = checkpoint(layer, x, positions, step, use_reentrant=False)
            else:
                x = layer(x, positions, step)
        normed: Tensor = self.norm(self._leave_layers(x))
        return normed

    def _enter_layers(self, x_BSD: Tensor) -> Tensor:
        """What the first layer takes."""
        return x_BSD

    def _leave_layers(self, x: Tensor) -> Tensor:
        """(B, S, D) from what the last layer gives."""
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden (..., D)."""
        unembedding = self.embedding if self.config.tie_embeddings else self.unembedding
        return F.linear(x, unembedding.weight)


def peri_norm(config: LanguageModelConfig) -> nn.Module:
    """The norm of what a block adds, which only peri has."""
    if config.norm == "peri":
        return RMSNorm(config.dim, config.norm_epsilon)
    return nn.Identity()
