# SPDX-License-Identifier: Apache-2.0
"""The section [data]. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fomoe.federation.config.section import Count, CountOrZero, Positive, Section, Text

__all__ = ["DataConfig", "SourceConfig"]


class SourceConfig(Section):
    """A source of documents, one `[[data.sources]]` table (see fomoe.data.Source)."""

    path: Annotated[Text, Field(min_length=1)]
    weight: Positive = 1.0
    """Relative share of the sequences of every site."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """auto: by suffix."""
    field: Annotated[str, Field(min_length=1)] = "text"
    """Key of a JSON line, or column of a parquet file, that holds the document."""


class DataConfig(Section):
    """The text in memory (`paths`) or streamed (`sources`); see docs/data.md.

    Relative paths start at the current directory.
    """

    paths: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Files and folders, one domain each; without sources none: the text every Python brings."""
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """Sources of documents, one domain each, instead of paths."""
    tokenizer: Text = ""
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
