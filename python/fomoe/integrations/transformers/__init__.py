# SPDX-License-Identifier: Apache-2.0
"""fomoe in Hugging Face ``transformers`` (extra ``hf``)."""

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as _  # noqa: F401  since 5.23
except ImportError as error:
    raise ImportError(
        "fomoe.integrations.transformers needs transformers >= 5.23: pip install 'fomoe[hf]'"
    ) from error

from fomoe.integrations.transformers.export import export_huggingface
from fomoe.integrations.transformers.modeling import FomoeConfig, FomoeForCausalLM
from fomoe.integrations.transformers.replace import replace_moe_blocks

__all__ = ["FomoeConfig", "FomoeForCausalLM", "export_huggingface", "replace_moe_blocks"]
