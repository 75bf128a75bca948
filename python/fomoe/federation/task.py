# SPDX-License-Identifier: Apache-2.0
"""What the federation trains: a model, its data and its loss, behind one small interface."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.data import Corpus, SiteBatches, load_corpus, validation_batches
from fomoe.errors import UserError
from fomoe.federation.config import Config, ModelConfig
from fomoe.models import Decoder, DecoderConfig, configuration
from fomoe.nn import MoE, auxiliary_loss, initialize

__all__ = ["LanguageModelTask", "Loss", "Task"]


class Loss(NamedTuple):
    """``objective`` is what backward runs on; ``language_model`` the mean nats per token in it."""

    objective: Tensor
    language_model: Tensor


class Task(Protocol):
    """Everything the trainer needs to know; an instance travels to the site processes by pickle.

    The model's experts follow the rule of :mod:`fomoe.federation.parameters`. ``build_model`` must
    give every tensor the same initial value on every site that holds it.
    """

    num_layers: int
    num_experts: int

    @property
    def model_settings(self) -> dict[str, Any]:
        """What rebuilds the model, as JSON-able values; stored with every checkpoint."""
        ...

    def check(self) -> None:
        """Raise UserError now for data that would fail in the middle of a run."""
        ...

    def build_model(self, residents: Sequence[Sequence[int]] | None) -> nn.Module:
        """The initialised model with these experts per layer; None: all of them."""
        ...

    def batch(self, site: int, step: int) -> Tensor:
        """Tokens of the 0-based step, int64 (B, S + 1)."""
        ...

    def loss(self, model: nn.Module, tokens: Tensor) -> Loss: ...

    def validation_loss(self, model: nn.Module) -> float:
        """Mean nats per token over the validation text, without gradient."""
        ...

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        """Routing statistics per layer since the last call; empty when the model has none."""
        ...


class LanguageModelTask:
    """A :class:`fomoe.models.Decoder` on byte tokens of a corpus, as the settings describe them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model_config = _decoder_config(config.model)
        self.num_layers = self.model_config.num_layers
        self.num_experts = self.model_config.num_experts
        self._corpus: Corpus | None = None
        self._batches: dict[int, SiteBatches] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Every site reads the text itself instead of receiving a copy.
        return self.__dict__ | {"_corpus": None, "_batches": {}}

    @property
    def model_settings(self) -> dict[str, Any]:
        return asdict(self.model_config)

    @property
    def corpus(self) -> Corpus:
        if self._corpus is None:
            self._corpus = load_corpus(self.config.data.paths, max_bytes=self.config.data.max_bytes)
        return self._corpus

    def check(self) -> None:
        for site in range(self.config.federation.sites):
            self.batch(site, 0)
        self._validation_windows()

    def build_model(self, residents: Sequence[Sequence[int]] | None) -> nn.Module:
        model = Decoder(self.model_config, residents)
        initialize(model, self.config.training.seed)
        return model

    def batch(self, site: int, step: int) -> Tensor:
        if site not in self._batches:
            self._batches[site] = SiteBatches(
                self.corpus,
                site=site,
                num_sites=self.config.federation.sites,
                batch_size=self.config.training.batch_size,
                sequence_length=self.config.training.sequence_length,
                seed=self.config.training.seed,
                domain_per_site=self.config.data.domain_per_site,
            )
        return torch.from_numpy(self._batches[site].batch(step))

    def loss(self, model: nn.Module, tokens: Tensor) -> Loss:
        with self._precision():
            logits = model(tokens[:, :-1])
        language_model = _cross_entropy(logits, tokens[:, 1:])
        return Loss(language_model + auxiliary_loss(model), language_model)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        for windows in self._validation_windows():
            tokens = torch.from_numpy(windows)
            with self._precision():
                logits = model(tokens[:, :-1])
            targets = tokens[:, 1:]
            total += _cross_entropy(logits, targets).item() * targets.numel()
            count += targets.numel()
        return total / count

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        layers: list[dict[str, Any]] = []
        for module in model.modules():
            if isinstance(module, MoE):
                statistics = module.statistics()
                module.reset_statistics()
                layers.append({"layer": len(layers), **asdict(statistics)})
        return layers

    def _validation_windows(self) -> Iterator[npt.NDArray[np.int64]]:
        return validation_batches(
            self.corpus,
            sequence_length=self.config.training.sequence_length,
            num_sequences=self.config.data.validation_sequences,
            batch_size=self.config.evaluation.batch_size,
        )

    def _precision(self) -> torch.autocast:
        enabled = self.config.training.precision == "bf16"
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def _decoder_config(settings: ModelConfig) -> DecoderConfig:
    if settings.name is None:
        values = settings.model_dump(exclude={"name"})
        return DecoderConfig(**values | {"capacity_factor": settings.capacity_factor or None})
    try:
        named = configuration(settings.name)
    except ValueError as error:
        raise UserError(f"model.name: {error}") from None
    beside = settings.model_fields_set - {"name"}
    return replace(named, **{key: getattr(settings, key) for key in beside})


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
