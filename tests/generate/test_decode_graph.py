# SPDX-License-Identifier: Apache-2.0
"""Decode by replay. On the CPU a trace takes a CUDA graph's place: all that Python decided, and
every number it read, is fixed in it, and tensors that it did not make are where they were."""

import pytest
import torch
from generation_models import MODELS, tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

from fomoe.generate import Generation, Sampling, generate
from fomoe.generate.decode_graph import DecodeGraphs

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


class Traces:
    """A capture that counts."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, step):
        self.captured += 1
        trace = make_fx(step)()

        def replay():
            self.replayed += 1
            return trace()

        return replay


@pytest.mark.parametrize("kind", MODELS)
def test_replayed_steps_give_the_same_tokens_as_called_ones(kind):
    model, traces = tiny_model(kind), Traces()
    settings = Generation(max_new_tokens=30, sampling=Sampling(temperature=0.7, seed=3))
    expected = generate(model, PROMPTS, settings)
    assert generate(model, PROMPTS, settings, capture=traces) == expected
    assert (traces.captured, traces.replayed) == (1, 29)


def test_a_sequence_that_has_ended_takes_part_as_padding():
    model, sampling = tiny_model(), Sampling(temperature=2.0)
    free = generate(model, PROMPTS, Generation(max_new_tokens=20, sampling=sampling))
    stop = next(token for token in free[1][1:] if token not in free[0])
    settings = Generation(max_new_tokens=20, sampling=sampling, stop_tokens=[stop])
    stopped = generate(model, PROMPTS, settings, capture=Traces())
    assert stopped == generate(model, PROMPTS, settings)
    assert len(stopped[1]) < len(stopped[0])


@pytest.mark.parametrize("kind", ["moe", "foe", "windowed"])
def test_every_number_of_blocks_has_a_graph_and_the_last_ends_with_the_cache(kind):
    model, traces = tiny_model(kind), Traces()
    cache, alone = model.new_cache(2, 19), model.new_cache(2, 19)
    graphs = DecodeGraphs(model, cache, traces, block=8)
    with torch.no_grad():
        for step in range(19):
            tokens = [step, None if step % 3 else 60 - step]
            here = [[] if token is None else [token] for token in tokens]
            expected = model.unembed(
                model.hidden(
                    torch.tensor([[token or 0] for token in tokens]),
                    alone.step([len(each) for each in here]),
                )[:, 0]
            )
            torch.testing.assert_close(graphs(tokens)[0], expected[0], rtol=0, atol=1e-12)
    assert traces.captured == 3  # 8, 16 and 19 positions
    with pytest.raises(ValueError, match="expected at most 19 tokens in a sequence, got 20"):
        graphs([1, None])
