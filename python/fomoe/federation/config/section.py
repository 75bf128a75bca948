# SPDX-License-Identifier: Apache-2.0
"""What the sections of a configuration are made of. Imports no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "BelowOne",
    "Count",
    "CountOrZero",
    "Fraction",
    "NotNegative",
    "Positive",
    "Section",
    "Text",
]

Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Without NUL, which no file system takes."""


class Section(BaseModel):
    """One table of the file: unknown keys, other types and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
