# SPDX-License-Identifier: Apache-2.0
"""What `fomoe generate` does."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from fomoe.errors import UserError
from fomoe.generate.loop import Generation, Model, stream
from fomoe.generate.opening import Opening
from fomoe.generate.sampling import Sampling
from fomoe.generate.text import Decoding, Text, text_of

__all__ = ["Request", "run"]


@dataclass(kw_only=True, frozen=True, slots=True)
class Request:
    """What the command was asked for; ``dtype`` is a name of torch, None what the file has."""

    checkpoint: Path
    prompts: Sequence[str]
    max_new_tokens: int
    sampling: Sampling
    device: str = "cpu"
    dtype: str | None = None
    tokenizer: Path | None = None


def run(request: Request, out: TextIO = sys.stdout, report: TextIO = sys.stderr) -> None:
    """Write every prompt with its continuation to ``out``, and the speed to ``report``.

    A single prompt's text is written as it comes, several one after another.

    Raises
    ------
    UserError
        Before any weight is read: what does not fit.
    """
    device = _device(request.device)
    opening = Opening.of(request.checkpoint)
    text = text_of(
        opening.folder, request.tokenizer or opening.tokenizer, opening.config.vocab_size
    )
    prompts = _encoded(request, text, opening.config.context_length)
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    model = opening.load(dtype=dtype, device=device)
    settings = Generation(
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop_tokens=text.stop_tokens,
    )
    decodings = [text.decoding(tokens) for tokens in prompts]
    _Writing(request.prompts, decodings, out, report).write(model, prompts, settings)


def _encoded(request: Request, text: Text, context_length: int) -> list[list[int]]:
    prompts = [text.encode(prompt) for prompt in request.prompts]
    for number, tokens in enumerate(prompts, start=1):
        if not tokens:
            raise UserError(f"prompt {number} is empty: expected at least one token")
        needed = len(tokens) + request.max_new_tokens
        if 0 < context_length < needed:
            raise UserError(
                f"prompt {number} has {len(tokens)} tokens and --max-new-tokens is "
                f"{request.max_new_tokens}: together {needed}, but the model's context is "
                f"{context_length}"
            )
    return prompts


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch finds no GPU")
    return device


class _Writing:
    def __init__(
        self, prompts: Sequence[str], decodings: Sequence[Decoding], out: TextIO, report: TextIO
    ) -> None:
        self.prompts, self.out, self.report = prompts, out, report
        self.decodings = decodings
        self.texts = [""] * len(prompts)

    def write(self, model: Model, prompts: Sequence[Sequence[int]], settings: Generation) -> None:
        alone = len(prompts) == 1
        if alone:
            self._say(self.prompts[0])
        times, num_tokens = [time.perf_counter()], 0
        for step in stream(model, prompts, settings):
            times.append(time.perf_counter())
            num_tokens += len(step)
            for index, token in step.items():
                added = self.decodings[index].push(token)
                self.texts[index] += added
                if alone:
                    self._say(added)
        for index, decoding in enumerate(self.decodings):
            rest = decoding.end()
            self.texts[index] += rest
            if alone:
                self._say(rest + "\n")
            else:
                self._say(f"--- {index + 1}\n{self.prompts[index]}{self.texts[index]}\n")
        self._report(times, num_tokens, sum(map(len, prompts)))

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _report(self, times: Sequence[float], num_tokens: int, num_prompt_tokens: int) -> None:
        if len(times) < 2:
            print("no new tokens", file=self.report)
            return
        first = times[1] - times[0]
        parts = [f"{num_prompt_tokens} prompt tokens, first new ones after {first:.2f} s"]
        if len(times) > 2:
            seconds = times[-1] - times[1]
            parts.append(
                f"then {seconds / (len(times) - 2) * 1e3:.1f} ms a step; "
                f"{num_tokens / (times[-1] - times[0]):.1f} tokens/s in all"
            )
        print(", ".join(parts), file=self.report)
