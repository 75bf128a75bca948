# SPDX-License-Identifier: Apache-2.0
"""Turns what pydantic finds wrong with the settings into one sentence for the user."""

import difflib
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

__all__ = ["describe"]

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "bool_type": "true or false",
    "tuple_type": "an array",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "greater_than_equal": "a number >= {ge}",
    "greater_than": "a number > {gt}",
    "less_than_equal": "a number <= {le}",
    "less_than": "a number < {lt}",
    "too_long": "an array of at most {max_length} values",
    "literal_error": "one of {expected}",
}


def describe(
    error: ValidationError,
    schema: type[BaseModel],
    source: str,
    origins: Mapping[tuple[str, ...], str],
) -> str:
    """One sentence on the first mistake: where it was written, key, expected, got.

    Parameters
    ----------
    schema
        The model that was validated; its fields are the sections.
    source
        Where settings come from, for example the file name.
    origins
        Where single settings come from instead, by (section, key).
    """
    mistakes = error.errors(include_url=False)
    # A misspelt required key is also reported as missing; the spelling is the mistake.
    first = next((each for each in mistakes if each["type"] == "extra_forbidden"), mistakes[0])
    path = tuple(str(part) for part in first["loc"])
    origin = origins.get(path[:2], source)
    if first["type"] == "extra_forbidden":
        return f"{origin}: {_unknown_key(path, schema)}"
    if first["type"] == "value_error":  # a cross check: its settings may come from both places
        return f"{source}{' with overrides' if origins else ''}: {first['ctx']['error']}"
    expected = _missing(path, schema) if first["type"] == "missing" else _expected(first)
    return f"{origin}: {_key(path)}: expected {expected}, {_got(first)}"


def _unknown_key(path: tuple[str, ...], schema: type[BaseModel]) -> str:
    kind, place = ("section", "the file") if len(path) == 1 else ("key", f"[{path[0]}]")
    known = list(_model_at(path[:-1], schema).model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"{place} knows {', '.join(known)}"
    return f"unknown {kind} {_key(path)!r}: {hint}"


def _missing(path: tuple[str, ...], schema: type[BaseModel]) -> str:
    if len(path) == 1:
        return "a table"
    if path[-1].isdigit():
        return "one more value"
    annotation = _model_at(path[:-1], schema).model_fields[path[-1]].annotation
    choices = typing.get_args(annotation)
    return f"one of {', '.join(map(repr, choices))}" if choices else "a value"


def _model_at(path: tuple[str, ...], schema: type[BaseModel]) -> type[BaseModel]:
    for part in path:
        if part.isdigit():  # an entry of the array that the part before has led to
            continue
        annotation = schema.model_fields[part].annotation
        models = [annotation, *typing.get_args(annotation)]
        schema = next(m for m in models if isinstance(m, type) and issubclass(m, BaseModel))
    return schema


def _key(path: tuple[str, ...]) -> str:
    """(optimizer, betas, 0) -> optimizer.betas[0]."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path)[1:]


def _expected(mistake: ErrorDetails) -> str:
    template = _EXPECTED.get(mistake["type"])
    return template.format(**mistake.get("ctx", {})) if template else mistake["msg"]


def _got(mistake: ErrorDetails) -> str:
    if mistake["type"] == "missing":
        return "got none"
    value: Any = mistake["input"]
    if isinstance(value, bool):
        return f"got {str(value).lower()}"
    if isinstance(value, typing.Mapping):
        return "got a table"
    return f"got {value!r}"
