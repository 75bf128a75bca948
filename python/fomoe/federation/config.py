# SPDX-License-Identifier: Apache-2.0
"""Settings of a training run: a TOML file plus dotted overrides, checked before work starts.

`load_config` reads them, `Config` holds them. Defaults follow FoMoE (arXiv 2606.19025, section 5
and appendix) where it states one: outer learning rate and momentum, betas, eps, weight decay,
local_steps. Imports no torch.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fomoe.errors import UserError
from fomoe.federation.config_errors import describe

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

Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
_NO_NUL = r"^[^\x00]*$"  # no file system takes it


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The decoder: the fields of fomoe.models.DecoderConfig, or `name`, one of its named ones.

    With `name`, only `vocab_size` may be set beside it, and wins over the named one's.
    """

    name: str | None = None
    vocab_size: Annotated[int, Field(ge=256)] = 256
    dim: Count = 256
    num_layers: Count = 4
    num_heads: Count = 4
    num_kv_heads: Count = Field(default_factory=lambda known: known.get("num_heads", 1))
    """Defaults to num_heads."""
    head_dim: Count = Field(
        default_factory=lambda known: max(1, known.get("dim", 1) // known.get("num_heads", 1))
    )
    """Defaults to dim / num_heads."""
    expert_dim: Count = 128
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8
    top_k: Count = 2
    activation: Literal["swiglu", "silu"] = "swiglu"
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scale: Positive = 1.0
    norm: Literal["pre", "peri"] = "pre"
    residual_scale: Positive = 1.0
    tie_embeddings: bool = True
    rope_theta: Positive = 10000.0
    norm_epsilon: Positive = 1e-6
    balance_loss_coefficient: NotNegative = 1e-2
    z_loss_coefficient: NotNegative = 1e-3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is not None:
            others = sorted(self.model_fields_set - {"name", "vocab_size"})
            if others:
                raise ValueError(
                    f"model.name = {self.name!r} fixes the model, "
                    f"so model.{others[0]} cannot be set as well"
                )
            return self
        if "head_dim" not in self.model_fields_set and self.dim % self.num_heads:
            raise ValueError(
                f"model.dim = {self.dim} is not divisible by model.num_heads = {self.num_heads} "
                "(or set model.head_dim)"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim = {self.head_dim} must be even, for the rotary embedding"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not divisible by "
                f"model.num_kv_heads = {self.num_kv_heads}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k = {self.top_k} is larger than model.num_experts = {self.num_experts}"
            )
        return self


class FederationConfig(_Section):
    """Who trains, and how sites meet.

    A round is `local_steps` optimizer steps. `ddp` averages gradients at every step and takes no
    outer step; `diloco` and `fomoe` meet at the end of a round.
    """

    strategy: Literal["ddp", "diloco", "fomoe"]
    sites: Count = 4
    overlap: Count = Field(default_factory=lambda known: known.get("sites", 1))
    """Sites that hold each expert. fomoe requires it; otherwise it is `sites`."""
    local_steps: Count = 32
    rounds: Count = 10
    outer: Literal["nesterov", "average"] = "nesterov"
    outer_lr: Positive = 0.7
    outer_momentum: BelowOne = 0.9

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strategy == "fomoe" and "overlap" not in self.model_fields_set:
            raise ValueError(
                "federation.overlap is missing: federation.strategy = 'fomoe' needs the number "
                f"of sites that hold each expert, from 1 to federation.sites = {self.sites}"
            )
        if self.overlap > self.sites:
            raise ValueError(
                f"federation.overlap = {self.overlap} is larger than "
                f"federation.sites = {self.sites}"
            )
        if self.strategy != "fomoe" and self.overlap != self.sites:
            raise ValueError(
                f"federation.overlap = {self.overlap} must equal "
                f"federation.sites = {self.sites} with "
                f"federation.strategy = {self.strategy!r}, which holds every expert on every site"
            )
        return self


class OptimizerConfig(_Section):
    """A site's own optimizer, with linear warm-up and cosine decay to `min_lr_ratio * lr`."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    warmup_steps: CountOrZero = 0
    min_lr_ratio: Fraction = 0.1
    clip_norm: NotNegative = 1.0
    """Largest norm of a site's gradient over its own parameters, 0 for no clipping."""


class TrainingConfig(_Section):
    """What one site computes with. `batch_size` counts sequences per site and step."""

    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 8
    sequence_length: Annotated[int, Field(ge=1, le=10**7)] = 256
    seed: CountOrZero = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads per site, 0 for max(1, cores // sites)."""


class SourceConfig(_Section):
    """A source of documents, one `[[data.sources]]` table (see fomoe.data.Source)."""

    path: Annotated[str, Field(min_length=1, pattern=_NO_NUL)]
    weight: Positive = 1.0
    """Relative share of the sequences of every site."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """auto: by suffix."""
    field: Annotated[str, Field(min_length=1)] = "text"
    """Key of a JSON line, or column of a parquet file, that holds the document."""


class DataConfig(_Section):
    """The text in memory (`paths`) or streamed (`sources`); see docs/data.md.

    Relative paths start at the current directory.
    """

    paths: Annotated[tuple[Annotated[str, Field(pattern=_NO_NUL)], ...], Field(strict=False)] = ()
    """Files and folders, one domain each; without sources none: the text every Python brings."""
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Sources of documents, one domain each, instead of paths."""
    tokenizer: Annotated[str, Field(pattern=_NO_NUL)] = ""
    """A tokenizer.json for sources; "": the tokens are bytes."""
    separator: str = "\n"
    """What follows every document of a source: a token of the tokenizer, or text."""
    domain_per_site: bool = False
    max_bytes: CountOrZero = 0
    """Upper bound of the text in memory, 0 for none."""
    validation_sequences: Count = 128

    @model_validator(mode="after")
    def _check(self) -> Self:
        for path in self.paths:
            if self.paths.count(path) > 1:
                raise ValueError(f"data.paths names {path!r} {self.paths.count(path)} times")
        if self.sources:
            self._check_sources()
        else:
            for name in ("tokenizer", "separator"):
                if getattr(self, name) != DataConfig.model_fields[name].default:
                    raise ValueError(f"data.{name} needs data.sources, got none")
        return self

    def _check_sources(self) -> None:
        for name in ("paths", "max_bytes"):
            if getattr(self, name):
                raise ValueError(f"data.{name} and data.sources cannot be set together")
        seen: dict[tuple[str, str], int] = {}
        for index, source in enumerate(self.sources):
            first = seen.setdefault((source.path, source.field), index)
            if first != index:
                raise ValueError(
                    f"data.sources[{index}] is data.sources[{first}] again: both read "
                    f"{source.path!r}"
                )
            if self.domain_per_site and source.weight != self.sources[0].weight:
                raise ValueError(
                    f"data.sources[{index}].weight = {source.weight} differs from "
                    f"data.sources[0].weight = {self.sources[0].weight}, but with "
                    "data.domain_per_site every site reads one source only"
                )


class EvaluationConfig(_Section):
    """Validation of the assembled model and of every site, every few rounds and at the end."""

    every: CountOrZero = 0
    """0: only at the end."""
    batch_size: Count = 16


class RunConfig(_Section):
    """Where results go. Relative folders start at the current directory."""

    folder: Annotated[str, Field(min_length=1, pattern=_NO_NUL)] = "runs/train"
    save: bool = True
    """Whether to write a checkpoint at the end."""


class Config(_Section):
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
        if model.name is None and model.num_experts * federation.overlap % federation.sites:
            raise ValueError(
                f"model.num_experts = {model.num_experts} times "
                f"federation.overlap = {federation.overlap} is not divisible by "
                f"federation.sites = {federation.sites}, so sites cannot hold equally many experts"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values, for manifests; `from_dict` gives an equal Config."""
        settings = self.model_dump(mode="json")
        if self.model.name is not None:
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
