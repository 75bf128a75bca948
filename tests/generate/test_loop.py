# SPDX-License-Identifier: Apache-2.0
"""Cached generation gives what computing everything anew gives, in batches as alone."""

import pytest
import torch
from generation_models import MODELS, tiny_model

from fomoe.generate import Generation, Sampling, generate, stream

every_kind = pytest.mark.parametrize("kind", MODELS)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def uncached(model, prompt, num_tokens):
    """The most likely continuation, and the logits of each token, computed from the whole text."""
    tokens, all_logits = list(prompt), []
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(torch.tensor([tokens]))[0, -1]
            all_logits.append(logits)
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], torch.stack(all_logits)


def cached_logits(model, text, begin):
    """Logits after every token of text from ``begin`` on, of a cache that is fed token by token."""
    cache = model.new_cache(1, len(text))
    parts = [text[:begin], *[[token] for token in text[begin:]]]
    logits = []
    with torch.no_grad():
        for part in parts:
            hidden = model.hidden(torch.tensor([part]), cache.step([len(part)]))
            logits.append(model.unembed(hidden)[0, -1])
    return torch.stack(logits)


@every_kind
def test_two_hundred_tokens_are_those_of_the_whole_text_each_time(kind):
    model = tiny_model(kind)
    expected, logits = uncached(model, PROMPTS[0], 200)
    assert generate(model, [PROMPTS[0]], Generation(max_new_tokens=200)) == [expected]
    text = PROMPTS[0] + expected[:-1]
    torch.testing.assert_close(cached_logits(model, text, 7), logits, rtol=0, atol=1e-9)


def differences(kind, dtype):
    """Of every token's logits, teacher-forced: the largest one, over their standard deviation."""
    model = tiny_model(kind, dtype)
    text = torch.randint(0, 61, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        whole = model(torch.tensor([text]))[0, 19:].double()
    return (cached_logits(model, text, 20).double() - whole).abs().amax(-1) / whole.std()


@every_kind
def test_in_float32_logits_stay_within_a_hundred_thousandth(kind):
    assert differences(kind, torch.float32).max() < 1e-5


@every_kind
def test_in_bfloat16_logits_stay_within_a_tenth_but_where_rounding_changes_an_expert(kind):
    close = differences(kind, torch.bfloat16) < 0.1
    assert close.float().mean() >= (1.0 if kind == "dense" else 0.9)


@every_kind
@pytest.mark.parametrize("prefill_tokens", [1, 4, 100])
def test_prompts_of_different_lengths_get_in_a_batch_what_they_get_alone(prefill_tokens, kind):
    model = tiny_model(kind)
    settings = Generation(max_new_tokens=20, prefill_tokens=prefill_tokens)
    together = generate(model, PROMPTS, settings)
    assert together == [uncached(model, prompt, 20)[0] for prompt in PROMPTS]


def test_a_stop_token_ends_its_sequence_alone_and_is_not_part_of_it():
    model = tiny_model()
    free = [uncached(model, prompt, 12)[0] for prompt in PROMPTS]
    stop = next(token for token in free[0] if token not in free[1] and token != free[0][0])
    stopped = generate(model, PROMPTS, Generation(max_new_tokens=12, stop_tokens=[stop]))
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == free[1]


def test_tokens_come_step_by_step():
    model = tiny_model()
    steps = stream(model, PROMPTS, Generation(max_new_tokens=3))
    assert next(steps).keys() == {0, 1, 2}
    assert len(list(steps)) == 2


def test_a_sequence_draws_the_same_tokens_whoever_is_beside_it():
    model = tiny_model()
    settings = Generation(max_new_tokens=15, sampling=Sampling(temperature=1.0, top_p=0.9, seed=5))
    together = generate(model, PROMPTS, settings)
    assert generate(model, PROMPTS[:1], settings) == together[:1]
    later = stream(model, PROMPTS[2:], settings, first=2)
    assert [step[0] for step in later] == together[2]
    assert generate(model, PROMPTS, settings) == together


def test_no_prompts_are_no_texts():
    assert generate(tiny_model(), [], Generation(max_new_tokens=3)) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompts: expected at least one token, got none in pro"):
        generate(tiny_model(), [[1], []], Generation(max_new_tokens=3))


def test_a_cache_refuses_more_than_it_has_room_for():
    cache = tiny_model().new_cache(2, capacity=4)
    cache.step([3, 1])
    with pytest.raises(ValueError, match="counts: expected at most 4 tokens in a sequence, got 5"):
        cache.step([2, 0])
    with pytest.raises(ValueError, match="counts: expected 2, got 1"):
        cache.step([1])
