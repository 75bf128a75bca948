# SPDX-License-Identifier: Apache-2.0
"""What a conversion has done so far, on disk: a killed one goes on from its last whole layer."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from fomoe.convert.evaluate import LayerQuality
from fomoe.convert.methods import LayerResult
from fomoe.convert.router import RouterWeights
from fomoe.errors import UserError
from fomoe.files import cannot, make_folder, write_text, write_whole

_SETTINGS = "settings.json"


class WorkFolder:
    """The folder ``.OUT.conversion`` beside OUT: settings and one file per finished layer.

    Raises
    ------
    UserError
        If the folder exists and ``resume`` is not set, or belongs to another conversion; or if it
        does not exist and ``resume`` is set.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = out.with_name(f".{out.name}.conversion")
        file = self.path / _SETTINGS
        if resume:
            self._require_same(file, settings)
            return
        if file.exists():
            raise UserError(
                f"{self.path} holds an unfinished conversion: go on with --resume, or remove it"
            )
        with cannot(f"write {self.path}"):
            if self.path.exists():  # layers without their settings are of no use
                shutil.rmtree(self.path)
            make_folder(self.path)
            write_text(file, json.dumps(settings, indent=1))

    def _require_same(self, file: Path, settings: Mapping[str, Any]) -> None:
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            raise UserError(f"--resume: there is no unfinished conversion in {self.path}") from None
        wanted = json.loads(json.dumps(settings))
        for name in wanted | found:
            if wanted.get(name) != found.get(name):
                raise UserError(
                    f"--resume: the unfinished conversion has {name} = {found.get(name)!r}, "
                    f"got {wanted.get(name)!r}"
                )

    def store(self, layer: int, result: LayerResult, quality: LayerQuality) -> None:
        """Write one layer, whole or not at all."""
        tensors = {"expert": result.expert.cpu()}
        if result.router is not None:
            tensors |= {f"router.{k}": v.cpu() for k, v in result.router._asdict().items()}
        header = {"quality": json.dumps(asdict(quality))}
        with cannot(f"write {self._layer(layer)}"):
            write_whole(self._layer(layer), partial(save_file, tensors, metadata=header))

    def load(self, layer: int) -> tuple[LayerResult, LayerQuality] | None:
        """A layer that was stored, on the CPU; None if there is none."""
        if not self._layer(layer).exists():
            return None
        path = self._layer(layer)
        with cannot(f"read {path}"), safe_open(path, framework="pt") as file:
            names = set(file.keys())
            values = json.loads(file.metadata()["quality"])
            router = None
            if "router.weight" in names:
                router = RouterWeights(
                    file.get_tensor("router.weight"), file.get_tensor("router.bias")
                )
            result = LayerResult(file.get_tensor("expert"), router)
        return result, LayerQuality(**values | {"usage": tuple(values["usage"])})

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def _layer(self, layer: int) -> Path:
        return self.path / f"layer_{layer:03}.safetensors"
