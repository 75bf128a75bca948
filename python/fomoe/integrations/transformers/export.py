# SPDX-License-Identifier: Apache-2.0
"""Writing a decoder as a folder that transformers reads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig

from fomoe.errors import UserError
from fomoe.files import cannot, make_folder, sync_file, sync_folder
from fomoe.integrations.transformers.modeling import FomoeConfig, FomoeForCausalLM
from fomoe.models import Decoder

__all__ = ["export_huggingface"]


def export_huggingface(model: Decoder, folder: Path, tokenizer: Mapping[str, bytes]) -> None:
    """Write ``model`` and its tokenizer's files as a folder that transformers reads after ``import
    fomoe.integrations.transformers``; the folder appears when it is whole.

    Raises
    ------
    UserError
        When there is something at ``folder``, or it cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: expected the name of a folder to make")
    partial = folder.with_name(f".{folder.name}.incomplete")
    with cannot(f"write {folder}"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
            _write(model, partial, tokenizer)
            for path in partial.iterdir():
                sync_file(path)
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write(model: Decoder, folder: Path, tokenizer: Mapping[str, bytes]) -> None:
    with torch.device("meta"):
        wrapper = FomoeForCausalLM(FomoeConfig(fomoe_model=model.config.to_dict()))
    wrapper.model = model
    stored = json.loads(tokenizer.get("generation_config.json", b"{}"))
    wrapper.generation_config = GenerationConfig.from_dict({**stored, "use_cache": False})
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    wrapper.save_pretrained(folder)
