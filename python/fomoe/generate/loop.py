# SPDX-License-Identifier: Apache-2.0
"""The two phases of generation: all tokens of the prompts at once, then one token a step.

B sequences, S tokens of a call, D model width, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fomoe.generate.decode_graph import Capture, DecodeGraphs, Model
from fomoe.generate.sampling import Sampler, Sampling

__all__ = ["Generation", "Model", "generate", "stream"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Generation:
    """How long, and how.

    ``stop_tokens`` end a sequence and do not become part of it. ``prefill_tokens`` is how many
    tokens of every prompt one call takes, which bounds its memory (our choice).
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Collection[int] = ()
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    *,
    first: int = 0,
    any_rank: Callable[[bool], bool] = bool,
    capture: Capture | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, see :func:`stream`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, settings, first=first, any_rank=any_rank, capture=capture):
        for sequence, token in step.items():
            texts[sequence].append(token)
    return texts


@torch.no_grad()
def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    *,
    first: int = 0,
    any_rank: Callable[[bool], bool] = bool,
    capture: Capture | None = None,
) -> Iterator[dict[int, int]]:
    """New tokens as they come: for every step, the token of each sequence that still goes on.

    The prompts may be of different lengths. A sequence's tokens do not depend on the others but
    for rounding, which differs between batch sizes.

    Parameters
    ----------
    model : Model
        In evaluation mode, on one device.
    prompts : Sequence[Sequence[int]]
        Token ids; none may be empty.
    settings : Generation
    first : int
        The number of the first prompt among those of all ranks, for its seed.
    any_rank : Callable[[bool], bool]
        For a model over several ranks, whose calls are collective: whether any of them says so.
        Ranks go on together until nobody has anything left.
    capture : Capture, optional
        Decode by replaying graphs that this makes, :func:`fomoe.generate.decode_graph.cuda_graphs`
        on a GPU. For a model on one device.

    Raises
    ------
    ValueError
        If a prompt is empty.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts: expected at least one token, got none in prompt {index}")
    longest = max(map(len, prompts), default=0)
    batch = _Batch(model, len(prompts), longest + settings.max_new_tokens, capture)
    sampler = Sampler(settings.sampling, len(prompts), first)
    logits_BV = _prefill(batch, prompts, settings.prefill_tokens, any_rank)
    going = [True] * len(prompts)
    for step in range(settings.max_new_tokens):
        chosen = sampler(logits_BV) if logits_BV is not None else []
        going = [g and t not in settings.stop_tokens for g, t in zip(going, chosen, strict=True)]
        new = {b: token for b, token in enumerate(chosen) if going[b]}
        if new:
            yield new
        is_last = step + 1 == settings.max_new_tokens
        if is_last or not any_rank(bool(new)):
            return
        logits_BV = batch.decode(
            [token if g else None for g, token in zip(going, chosen, strict=True)]
        )


class _Batch:
    """The sequences and their cache."""

    def __init__(
        self, model: Model, batch_size: int, capacity: int, capture: Capture | None
    ) -> None:
        self.model = model
        self.cache = model.new_cache(batch_size, capacity)
        self.graphs: DecodeGraphs | None = None
        if capture is not None and batch_size > 0:
            self.graphs = DecodeGraphs(model, self.cache, capture)

    def call(self, tokens: Sequence[Sequence[int]]) -> Tensor | None:
        """Logits (B, V) after each sequence's new tokens; None without sequences."""
        step = self.cache.step([len(new) for new in tokens])
        padded = [[*new, *[0] * (step.num_tokens - len(new))] for new in tokens]
        device = step.positions_BS.device
        tokens_BS = torch.tensor(padded, dtype=torch.int64, device=device)
        hidden_BSD = self.model.hidden(tokens_BS.reshape(len(tokens), step.num_tokens), step)
        if not tokens:
            return None
        rows_B = torch.arange(len(tokens), device=device)
        last_B = torch.tensor([max(len(new), 1) - 1 for new in tokens], device=device)
        return self.model.unembed(hidden_BSD[rows_B, last_B])

    def decode(self, tokens: Sequence[int | None]) -> Tensor | None:
        """Logits (B, V) after one more token of each sequence that has one."""
        if self.graphs is not None:
            return self.graphs(tokens)
        return self.call([[] if token is None else [token] for token in tokens])


def _prefill(
    batch: _Batch,
    prompts: Sequence[Sequence[int]],
    prefill_tokens: int,
    any_rank: Callable[[bool], bool],
) -> Tensor | None:
    """Logits (B, V) after the last token of every prompt."""
    logits_BV: Tensor | None = None
    begin = 0
    while any_rank(any(begin < len(prompt) for prompt in prompts)):
        part = [prompt[begin : begin + prefill_tokens] for prompt in prompts]
        new_BV = batch.call(part)
        if logits_BV is None or new_BV is None:
            logits_BV = new_BV
        else:
            had_any = torch.tensor([len(tokens) > 0 for tokens in part], device=new_BV.device)
            logits_BV = torch.where(had_any[:, None], new_BV, logits_BV)
        begin += prefill_tokens
    return logits_BV
