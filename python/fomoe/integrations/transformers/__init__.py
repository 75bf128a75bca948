# SPDX-License-Identifier: Apache-2.0
"""fomoe in Hugging Face ``transformers`` (extra ``hf``)."""

from fomoe.integrations.transformers.export import export_huggingface
from fomoe.integrations.transformers.modeling import FomoeConfig, FomoeForCausalLM
from fomoe.integrations.transformers.replace import replace_moe_blocks

__all__ = ["FomoeConfig", "FomoeForCausalLM", "export_huggingface", "replace_moe_blocks"]
