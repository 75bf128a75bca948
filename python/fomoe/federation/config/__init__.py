# SPDX-License-Identifier: Apache-2.0
"""Settings of a training run: a TOML file plus dotted overrides, checked before work starts.

`load_config` reads them, `Config` holds them. Defaults follow FoMoE (arXiv 2606.19025, section 5
and appendix) where it states one: outer learning rate and momentum, betas, eps, weight decay,
local_steps. Imports no torch.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from fomoe.errors import UserError
from fomoe.federation.config.data import DataConfig, SourceConfig
from fomoe.federation.config.errors import describe
from fomoe.federation.config.federation import FederationConfig
from fomoe.federation.config.model import ModelConfig
from fomoe.federation.config.section import Section
from fomoe.federation.config.training import (
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SourceConfig",
    "TrainingConfig",
    "load_config",
]


class Config(Section):
    """All settings of a run, defaults filled in, so that a manifest with them is complete."""

    model: ModelConfig = ModelConfig()
    federation: FederationConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        federation, model = self.federation, self.model
        steps = federation.rounds * federation.local_steps
        if self.optimizer.warmup_steps > steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is more than the "
                f"run's {steps} steps (federation.rounds = {federation.rounds} times "
                f"federation.local_steps = {federation.local_steps})"
            )
        if not model.is_named and model.num_experts * federation.overlap % federation.sites:
            raise ValueError(
                f"model.num_experts = {model.num_experts} times "
                f"federation.overlap = {federation.overlap} is not divisible by "
                f"federation.sites = {federation.sites}, so sites cannot hold equally many experts"
            )
        self._check_optimizer()
        self._check_sites()
        if model.capacity_factor > 0 and (federation.strategy == "ep" or federation.spread_experts):
            raise ValueError(
                f"model.capacity_factor = {model.capacity_factor} must be 0 where tokens travel to "
                "experts of other ranks: only the tokens of all ranks together could fill one"
            )
        return self

    def _check_optimizer(self) -> None:
        federation = self.federation
        if federation.outer == "local_adamw" and self.optimizer.name != "adamw":
            raise ValueError(
                "federation.outer = 'local_adamw' needs optimizer.name = 'adamw', "
                f"got {self.optimizer.name!r}"
            )

    def _check_sites(self) -> None:
        federation, training = self.federation, self.training
        if not isinstance(training.device, str) and len(training.device) != federation.sites:
            raise ValueError(
                f"training.device has {len(training.device)} entries, "
                f"but federation.sites = {federation.sites}"
            )
        if training.batch_size % federation.ranks_per_site:
            raise ValueError(
                f"training.batch_size = {training.batch_size}, the sequences of a site, is not "
                f"divisible by federation.ranks_per_site = {federation.ranks_per_site}"
            )
        for site in range(federation.sites if federation.ranks_per_site > 1 else 0):
            device = training.device_of(site)
            if ":" in device:
                raise ValueError(
                    f"training.device = {device!r} is a single GPU, but "
                    f"federation.ranks_per_site = {federation.ranks_per_site}: "
                    "with 'cuda' every rank gets one of its own"
                )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values, for manifests; `from_dict` gives an equal Config."""
        settings = self.model_dump(mode="json")
        if self.model.is_named:
            settings["model"] = {key: settings["model"][key] for key in self.model.model_fields_set}
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, source: str = "settings") -> "Config":
        """Checks `settings` ({section: {key: value}}) and builds a Config.

        Raises
        ------
        UserError
            One sentence that starts with `source` and names the key.
        """
        return _validate(settings, source, {})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides, the later one winning.

    An override's value is read as a TOML value (`8`, `0.5`, `true`, `["a.txt"]`); what is none is a
    string, so that words need no quotes.

    Raises
    ------
    UserError
        One sentence that names the file or override, the key, what was expected and what came.
    """
    path = Path(path)
    try:
        settings = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"configuration file {path} is not UTF-8 at byte offset {error.start}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        section, key, value = _parse_override(override)
        table = settings.setdefault(section, {})
        if isinstance(
            table, dict
        ):  # else: the check below says that the file's section is no table
            table[key] = value
            origins[section, key] = f"override {override}"
    return _validate(settings, str(path), origins)


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(
            f"override {override!r}: expected section.key=value, "
            "for example federation.local_steps=20"
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return section, key, text.strip()
    return section, key, parsed["value"]


def _validate(
    settings: Mapping[str, Any], source: str, origins: Mapping[tuple[str, ...], str]
) -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(describe(error, Config, source, origins)) from None
