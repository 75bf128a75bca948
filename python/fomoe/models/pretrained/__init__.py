# SPDX-License-Identifier: Apache-2.0
"""Dense models of others as decoders: Hugging Face folders with safetensors, and GGUF files."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fomoe.errors import UserError
from fomoe.models.decoder import Decoder
from fomoe.models.pretrained.gguf import GgufFile, find_gguf
from fomoe.models.pretrained.huggingface import HuggingFaceFolder
from fomoe.models.pretrained.settings import decoder_config
from fomoe.models.pretrained.weights import copy_weights, require_fitting

__all__ = ["load_dense"]


def load_dense(
    source: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[Decoder, dict[str, bytes]]:
    """The dense model in ``source`` as a decoder, and the files of its tokenizer.

    Parameters
    ----------
    source : str or Path
        A folder with ``config.json`` and safetensors files, of the architecture llama, mistral,
        qwen2 or qwen3; or a ``.gguf`` file of one of them, or a folder with a single one, which
        takes ``pip install 'fomoe[hf]'`` and is de-quantised.
    dtype : torch.dtype, optional
        Of the weights; by default that of the files, float32 for GGUF.

    Returns
    -------
    (Decoder, dict[str, bytes])
        In evaluation mode on the CPU, every layer dense; contents of the tokenizer's files by name,
        as :func:`fomoe.models.save_model` takes them. A folder of safetensors takes the memory of
        the model, and while it reads the pages of one file, which the system can drop; GGUF takes
        twice that of the model in float32.

    Raises
    ------
    UserError
        Before any weight is read: for another architecture, a setting that a decoder has not,
        weights that are missing, unexpected or of another shape, or a tokenizer with more tokens
        than the model.
    """
    path = Path(source)
    gguf = find_gguf(path)
    stored = HuggingFaceFolder(path) if gguf is None else GgufFile(gguf)
    config = decoder_config(stored.settings, source)
    tokenizer = stored.tokenizer
    _require_fitting_tokenizer(tokenizer, config.vocab_size, source)
    with torch.device("meta"):
        model = Decoder(config)
    require_fitting(model, stored.shapes, source)
    model = model.to(dtype or stored.dtype).to_empty(device="cpu")
    copy_weights(model, stored.tensors())
    return model.eval(), tokenizer


def _require_fitting_tokenizer(
    tokenizer: Mapping[str, bytes], vocab_size: int, source: str | Path
) -> None:
    if "tokenizer.json" not in tokenizer:
        return
    try:
        values = json.loads(tokenizer["tokenizer.json"])
        vocabulary = values["model"]["vocab"]
        is_list = isinstance(vocabulary, list)
        ids = range(len(vocabulary)) if is_list else vocabulary.values()
        added = [token["id"] for token in values.get("added_tokens", [])]
        num_tokens = 1 + max([-1, *ids, *added])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: tokenizer.json is no tokenizer: {error!r}") from error
    if num_tokens > vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {num_tokens} tokens, but the model's vocabulary is "
            f"{vocab_size}"
        )
