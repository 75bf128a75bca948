# SPDX-License-Identifier: Apache-2.0
"""Text from language models: prefill and decode with a cache of keys and values."""

from fomoe.generate.decode_graph import Model, cuda_graphs
from fomoe.generate.loop import Generation, generate, stream
from fomoe.generate.sampling import Sampler, Sampling

__all__ = ["Generation", "Model", "Sampler", "Sampling", "cuda_graphs", "generate", "stream"]
