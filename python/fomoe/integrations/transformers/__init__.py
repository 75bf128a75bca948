# SPDX-License-Identifier: Apache-2.0
"""fomoe in Hugging Face ``transformers`` (extra ``hf``)."""

from fomoe.integrations.transformers.export import export_huggingface
from fomoe.integrations.transformers.modeling import FomoeConfig, FomoeForCausalLM

__all__ = ["FomoeConfig", "FomoeForCausalLM", "export_huggingface"]
