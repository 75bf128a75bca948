# SPDX-License-Identifier: Apache-2.0
"""What the federation trains: a model, its data and its loss, behind one small interface."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.data import Batches, Batching, Source, StreamData, TextData, TrainingData
from fomoe.errors import UserError
from fomoe.federation.config import Config, ModelConfig
from fomoe.files import cannot
from fomoe.models import (
    Decoder,
    DecoderConfig,
    LanguageModel,
    LanguageModelConfig,
    build_model,
    config_from_dict,
    config_to_dict,
    configuration,
    load_weights,
    read_config,
    read_tokenizer_files,
)
from fomoe.nn import RoutedLayer, auxiliary_loss, initialize

__all__ = ["ExpertParallelTask", "LanguageModelTask", "Loss", "Task", "expert_parallel_model"]


class Loss(NamedTuple):
    """``objective`` is what backward runs on; ``language_model`` the mean nats per token in it."""

    objective: Tensor
    language_model: Tensor


class Task(Protocol):
    """Everything the trainer needs to know; an instance travels to the site processes by pickle.

    The model's experts follow the rule of :mod:`fomoe.federation.parameters`. ``build_model`` must
    give every tensor the same initial value on every site that holds it.
    """

    num_layers: int  # those that have experts
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
        """Tokens of the 0-based step, int64 (B, S + 1); steps are asked for in order."""
        ...

    def data_state(self, site: int) -> dict[str, Any]:
        """Where a site stands in its data after the last batch, as JSON-able values."""
        ...

    def load_data_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the ``data_state`` of every site of a run, whose number may have been another.

        With the same number, every site gets exactly the batches it would have got.
        """
        ...

    def loss(self, model: nn.Module, tokens: Tensor) -> Loss: ...

    def validation_loss(self, model: nn.Module) -> float:
        """Mean nats per token over the validation text, without gradient."""
        ...

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        """Routing statistics per layer since the last call; empty when the model has none."""
        ...


@runtime_checkable
class ExpertParallelTask(Protocol):
    """A task that ``federation.strategy = "ep"`` can train."""

    def build_expert_parallel_model(self, exchanges: Sequence[ExpertExchange]) -> nn.Module:
        """The initialised model with the experts this rank owns, by an exchange per layer."""
        ...


def expert_parallel_model(
    task: Task, exchanges: Sequence[ExpertExchange], setting: str
) -> nn.Module:
    """The task's model with an exchange per layer, which ``setting`` asks for.

    Raises
    ------
    UserError
        The task has no such model.
    """
    if not isinstance(task, ExpertParallelTask):
        raise UserError(
            f"{setting} needs a task with build_expert_parallel_model, got {type(task).__name__}"
        )
    return task.build_expert_parallel_model(exchanges)


class LanguageModelTask:
    """A :class:`fomoe.models.LanguageModel` on the data, as the settings describe them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model_config = _model_config(config.model)
        self.num_layers = len(self.model_config.moe_layers)
        self.num_experts = self.model_config.num_experts
        self.data = _training_data(config)
        self._batches: dict[int, Batches] = {}
        self._data_states: tuple[Mapping[str, Any], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel; what a site needs of the data it reads itself.
        return self.__dict__ | {"_batches": {}}

    @property
    def model_settings(self) -> dict[str, Any]:
        return config_to_dict(self.model_config)

    def check(self) -> None:
        if self.model_config.vocab_size < self.data.vocab_size:
            name = "model.checkpoint: vocab_size" if self._checkpoint else "model.vocab_size"
            raise UserError(
                f"{name} = {self.model_config.vocab_size} is smaller than the "
                f"{self.data.vocab_size} tokens of data.tokenizer = {self.config.data.tokenizer!r}"
            )
        strategy = self.config.federation.strategy
        if self.num_layers == 0 and strategy in ("fomoe", "ep"):
            raise UserError(
                f"federation.strategy = {strategy!r} needs a model with experts, but every layer "
                "of this one is dense"
            )
        federation = self.config.federation
        if not isinstance(self.model_config, DecoderConfig) and (
            strategy == "ep" or federation.spread_experts
        ):
            setting = "strategy = 'ep'" if strategy == "ep" else "spread_experts"
            raise UserError(
                f"federation.{setting} needs a model of the family 'decoder', "
                f"got {self.model_config.family!r}"
            )
        _check_tokenizer(self.config)
        self.data.check()

    def build_model(self, residents: Sequence[Sequence[int]] | None) -> nn.Module:
        return self._with_first_weights(build_model(self.model_config, residents))

    def build_expert_parallel_model(self, exchanges: Sequence[ExpertExchange]) -> nn.Module:
        assert isinstance(self.model_config, DecoderConfig)  # see check
        return self._with_first_weights(Decoder(self.model_config, exchanges=exchanges))

    def _with_first_weights(self, model: LanguageModel) -> LanguageModel:
        """Of the tensors that ``model`` holds alone."""
        if self._checkpoint is None:
            initialize(model, self.config.training.seed)
        else:
            load_weights(model, self._checkpoint)
        return model

    @property
    def _checkpoint(self) -> str | None:
        return self.config.model.checkpoint

    def batch(self, site: int, step: int) -> Tensor:
        return torch.from_numpy(self._site_batches(site).batch(step))

    def data_state(self, site: int) -> dict[str, Any]:
        return self._site_batches(site).state()

    def load_data_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        self._data_states = tuple(states)
        self._batches = {}

    def loss(self, model: nn.Module, tokens: Tensor) -> Loss:
        with self._precision(tokens.device):
            logits = model(tokens[:, :-1])
        language_model = _cross_entropy(logits, tokens[:, 1:])
        return Loss(language_model + auxiliary_loss(model), language_model)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for windows in self.data.validation(self.config.evaluation.batch_size):
            tokens = torch.from_numpy(windows).to(device)
            with self._precision(device):
                logits = model(tokens[:, :-1])
            targets = tokens[:, 1:]
            total += _cross_entropy(logits, targets).item() * targets.numel()
            count += targets.numel()
        return total / count

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        layers: list[dict[str, Any]] = []
        for module in model.modules():
            if isinstance(module, RoutedLayer):
                statistics = module.statistics()
                module.reset_statistics()
                layers.append({"layer": len(layers), **asdict(statistics)})
        return layers

    def _site_batches(self, site: int) -> Batches:
        if site not in self._batches:
            self._batches[site] = self.data.batches(site, self._data_states)
        return self._batches[site]

    def _precision(self, device: torch.device) -> torch.autocast:
        enabled = self.config.training.precision == "bf16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _training_data(config: Config) -> TrainingData:
    batching = Batching(
        num_sites=config.federation.sites,
        batch_size=config.training.batch_size,
        sequence_length=config.training.sequence_length,
        seed=config.training.seed,
        domain_per_site=config.data.domain_per_site,
        validation_sequences=config.data.validation_sequences,
    )
    data = config.data
    if not data.sources:
        return TextData(data.paths, data.max_bytes, batching)
    sources = [Source(**source.model_dump()) for source in data.sources]
    return StreamData(sources, data.tokenizer, data.separator, batching)


def _check_tokenizer(config: Config) -> None:
    """Data must be in the tokens of the model that is gone on from, as far as it knows them."""
    checkpoint, data = config.model.checkpoint, config.data
    known = read_tokenizer_files(checkpoint).get("tokenizer.json") if checkpoint else None
    if known is None:
        return
    found = b"{}"
    if data.sources and data.tokenizer:
        with cannot(f"read data.tokenizer = {data.tokenizer!r}"):
            found = Path(data.tokenizer).read_bytes()
    try:
        same = json.loads(known)["model"] == json.loads(found).get("model")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"model.checkpoint or data.tokenizer is no tokenizer: {error}") from error
    if not same:
        raise UserError(
            f"model.checkpoint = {checkpoint!r} has tokens of its own: expected data.sources with "
            f"data.tokenizer = {str(Path(checkpoint or '') / 'tokenizer.json')!r}, "
            f"got {data.tokenizer!r}"
        )


def _model_config(settings: ModelConfig) -> LanguageModelConfig:
    if settings.checkpoint is not None:
        return _with(read_config(settings.checkpoint), settings, "checkpoint")
    if settings.name is not None:
        try:
            named = configuration(settings.name)
        except ValueError as error:
            raise UserError(f"model.name: {error}") from None
        return _with(named, settings, "name")
    values = settings.shape()
    if "capacity_factor" in values:
        values["capacity_factor"] = values["capacity_factor"] or None
    try:
        return config_from_dict(values)
    except ValueError as error:  # which begins with the name of the field
        raise UserError(f"model.{error}") from None


def _with(config: LanguageModelConfig, settings: ModelConfig, setting: str) -> LanguageModelConfig:
    """``config`` with what is set beside ``setting``, which names it."""
    beside = {name: getattr(settings, name) for name in settings.model_fields_set - {setting}}
    if "router" in beside and not isinstance(config, DecoderConfig):
        raise UserError(
            f"model.router: a model of the family {config.family!r} has no such setting, "
            f"got {settings.router!r}"
        )
    return replace(config, **beside)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
