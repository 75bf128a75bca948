# SPDX-License-Identifier: Apache-2.0
"""Text from language models: prefill and decode with a cache of keys and values."""

from fomoe.generate.loop import Generation, Model, generate, stream
from fomoe.generate.sampling import Sampler, Sampling

__all__ = ["Generation", "Model", "Sampler", "Sampling", "generate", "stream"]
