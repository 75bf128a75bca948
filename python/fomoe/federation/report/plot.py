# SPDX-License-Identifier: Apache-2.0
"""What the page shows of a figure."""

from dataclasses import dataclass

__all__ = ["Plot"]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Heading, what it shows, and one or more SVG elements."""

    title: str
    caption: str
    svg: str
