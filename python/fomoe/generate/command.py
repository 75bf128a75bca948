# SPDX-License-Identifier: Apache-2.0
"""What `fomoe generate` does."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from fomoe.devices import usable_device
from fomoe.errors import UserError
from fomoe.generate.decode_graph import Capture, Model, cuda_graphs
from fomoe.generate.loop import Generation, stream
from fomoe.generate.opening import Opening
from fomoe.generate.ranks import Ranks, is_one_of_many, ranks_of_this_run
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
    cuda_graph: bool = False
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
    device = usable_device(request.device)
    if request.cuda_graph and (device.type != "cuda" or is_one_of_many()):
        raise UserError("--cuda-graph: expected a model on one GPU, with --device cuda")
    with ranks_of_this_run(device) as ranks:
        _run(request, device, ranks, out, report)


def _run(request: Request, device: torch.device, ranks: Ranks, out: TextIO, report: TextIO) -> None:
    opening = Opening.of(request.checkpoint)
    text = text_of(
        opening.folder,
        request.tokenizer or opening.tokenizer,
        opening.config.vocab_size,
        opening.separator,
    )
    prompts = _encoded(request, text, opening.config.context_length)
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    ranks.share_out(opening.config)
    model = opening.load(dtype=dtype, device=device, build=ranks.build)
    settings = Generation(
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop_tokens=text.stop_tokens,
    )
    decodings = [text.decoding(tokens) for tokens in prompts]
    capture = cuda_graphs(device) if request.cuda_graph else None
    writing = _Writing(request.prompts, decodings, ranks, out, report)
    writing.write(model, prompts, settings, capture)


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


class _Writing:
    """Of the texts of all prompts, by the rank that writes.

    A single prompt's text comes as it is made: the first rank has the first prompt.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        decodings: Sequence[Decoding],
        ranks: Ranks,
        out: TextIO,
        report: TextIO,
    ) -> None:
        self.prompts, self.ranks, self.out, self.report = prompts, ranks, out, report
        self.decodings = decodings
        self.streams = len(prompts) == 1 and ranks.writes

    def write(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        settings: Generation,
        capture: Capture | None,
    ) -> None:
        here = self.ranks.prompts(len(prompts))
        texts = dict.fromkeys(here, "")
        if self.streams:
            self._say(self.prompts[0])
        times, num_tokens = [time.perf_counter()], 0
        for step in stream(
            model,
            prompts[here.start : here.stop],
            settings,
            first=here.start,
            any_rank=self.ranks.any_rank,
            capture=capture,
        ):
            times.append(time.perf_counter())
            num_tokens += len(step)
            for index, token in step.items():
                texts[here[index]] += self._shown(self.decodings[here[index]].push(token))
        for number in here:
            texts[number] += self._shown(self.decodings[number].end())
        everyones = self.ranks.all_texts(list(texts.values()))
        if not self.ranks.writes:
            return
        if self.streams:
            self._say("\n")
        else:
            for number, (prompt, text) in enumerate(zip(self.prompts, everyones, strict=True), 1):
                self._say(f"--- {number}\n{prompt}{text}\n")
        num_prompt_tokens = sum(len(prompts[number]) for number in here)
        self._report(times, num_tokens, num_prompt_tokens, len(here) < len(prompts))

    def _shown(self, text: str) -> str:
        if self.streams:
            self._say(text)
        return text

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _report(
        self,
        times: Sequence[float],
        num_tokens: int,
        num_prompt_tokens: int,
        others_have_some: bool,
    ) -> None:
        where = " on the first rank" if others_have_some else ""
        if len(times) < 2:
            print(f"no new tokens{where}", file=self.report)
            return
        first = times[1] - times[0]
        parts = [f"{num_prompt_tokens} prompt tokens{where}, first new ones after {first:.2f} s"]
        if len(times) > 2:
            seconds = times[-1] - times[1]
            parts.append(
                f"then {seconds / (len(times) - 2) * 1e3:.1f} ms a step; "
                f"{num_tokens / (times[-1] - times[0]):.1f} tokens/s in all"
            )
        print(", ".join(parts), file=self.report)
