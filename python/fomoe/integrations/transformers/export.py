# SPDX-License-Identifier: Apache-2.0
"""Writing a decoder as a folder that transformers reads."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from fomoe.errors import UserError
from fomoe.files import cannot, make_folder, sync_file, sync_folder
from fomoe.integrations.transformers.glm4_moe import glm4_moe
from fomoe.integrations.transformers.modeling import FomoeConfig, FomoeForCausalLM
from fomoe.models import Decoder

__all__ = ["export_huggingface"]


def export_huggingface(
    model: Decoder,
    folder: Path,
    tokenizer: Mapping[str, bytes],
    architecture: Literal["fomoe", "glm4-moe"] = "fomoe",
) -> None:
    """Write ``model`` and its tokenizer's files as a folder that transformers reads; it appears
    when it is whole.

    Parameters
    ----------
    architecture : str
        "fomoe", the same model, is read after ``import fomoe.integrations.transformers``;
        "glm4-moe", see :mod:`fomoe.integrations.transformers.glm4_moe`, needs nothing of ours.

    Raises
    ------
    UserError
        When there is something at ``folder``, it cannot be written, or the architecture has not a
        setting of the model.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: expected the name of a folder to make")
    theirs = glm4_moe(model) if architecture == "glm4-moe" else _wrapped(model)
    partial = folder.with_name(f".{folder.name}.incomplete")
    with cannot(f"write {folder}"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
            theirs.save_pretrained(partial)
            # Over the generation_config.json of defaults, and unread: many a published one is
            # refused by save_pretrained.
            for name, content in tokenizer.items():
                (partial / name).write_bytes(content)
            for path in partial.iterdir():
                sync_file(path)
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _wrapped(model: Decoder) -> FomoeForCausalLM:
    with torch.device("meta"):
        wrapper = FomoeForCausalLM(FomoeConfig(fomoe_model=model.config.to_dict()))
    wrapper.model = model
    return wrapper
