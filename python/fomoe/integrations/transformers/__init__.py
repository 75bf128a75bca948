# SPDX-License-Identifier: Apache-2.0
"""fomoe in Hugging Face ``transformers`` (extra ``hf``)."""

from fomoe.integrations.transformers.replace import replace_moe_blocks

__all__ = ["replace_moe_blocks"]
