"""Estimates are near the truth in the mean, for every habit of an upstream once it is known."""

from __future__ import annotations

import random

import pytest

from hoberproxy.accounting.estimates import DENSEST_LEARNT, MAX_LEARNT, USUAL_ANSWER, Estimates
from hoberproxy.dialects.usage import Usage

ENDPOINT = ("east", "model")


class Habits:
    """An upstream that puts so many tokens into an event, give or take."""

    def __init__(self, per_event: float, bytes_per_token: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._per_event = per_event
        self._bytes_per_token = bytes_per_token

    def answer(self) -> tuple[int, int, list[int]]:
        """Bytes of the prompt, its tokens, and the tokens of each event."""
        prompt = self._random.randint(50, 3000)
        spread = self._random.uniform(0.85, 1.15)
        sizes = [
            max(1, round(self._random.expovariate(1 / self._per_event)))
            if self._per_event > 1
            else int(self._random.random() < self._per_event)
            for _ in range(self._random.randint(20, 400))
        ]
        return round(prompt * self._bytes_per_token * spread), prompt, sizes


@pytest.mark.parametrize(
    ("per_event", "bytes_per_token"),
    [
        pytest.param(1.0, 4.0, id="a token an event, English"),
        pytest.param(4.0, 4.0, id="several tokens an event"),
        pytest.param(0.6, 2.5, id="events that hold a part of a token, code"),
        pytest.param(12.0, 1.5, id="speculative decoding, Chinese"),
    ],
)
def test_streams_cut_anywhere_are_estimated_within_15_percent_in_the_mean(
    per_event: float, bytes_per_token: float
) -> None:
    habits, estimates = Habits(per_event, bytes_per_token, seed=5), Estimates()
    for _ in range(30):
        prompt_bytes, prompt, sizes = habits.answer()
        usage = Usage(prompt, sum(sizes))
        estimates.learn(ENDPOINT, usage, prompt_bytes=prompt_bytes, events=len(sizes), body_bytes=0)
    errors = []
    for seed in range(200):
        prompt_bytes, prompt, sizes = habits.answer()
        cut = random.Random(seed).randint(10, len(sizes))
        truth = prompt + sum(sizes[:cut])
        guess = estimates.usage(ENDPOINT, prompt_bytes=prompt_bytes, events=cut, body_bytes=0)
        assert guess.is_estimated
        errors.append(abs(guess.prompt_tokens + guess.completion_tokens - truth) / truth)
    assert sum(errors) / len(errors) < 0.15


def test_bodies_are_estimated_by_their_bytes() -> None:
    estimates = Estimates()
    for _ in range(20):
        estimates.learn(ENDPOINT, Usage(100, 200), prompt_bytes=400, events=0, body_bytes=200 * 5)
    guess = estimates.usage(ENDPOINT, prompt_bytes=400, events=0, body_bytes=1000)
    assert guess.completion_tokens == pytest.approx(200, rel=0.05)


def test_what_an_endpoint_usually_answers_is_learnt() -> None:
    estimates = Estimates()
    assert estimates.of_call(ENDPOINT, 400) == (100, USUAL_ANSWER)
    for _ in range(5):
        estimates.learn(ENDPOINT, Usage(10, 80), prompt_bytes=40, events=80, body_bytes=0)
    assert estimates.of_call(ENDPOINT, 400) == (100, 80)
    assert estimates.of_call(("west", "model"), 0) == (0, USUAL_ANSWER)


def test_no_client_teaches_that_prompts_weigh_nothing() -> None:
    estimates = Estimates()
    for _ in range(30):  # runs of spaces, or images that were taken for text
        estimates.learn(ENDPOINT, Usage(100, 9), prompt_bytes=100_000, events=9, body_bytes=0)
    assert estimates.of_call(ENDPOINT, 4000)[0] == 1000
    guess = estimates.usage(ENDPOINT, prompt_bytes=4000, events=9, body_bytes=0)
    assert guess.prompt_tokens == round(4000 / DENSEST_LEARNT)


def test_answers_too_short_to_tell_teach_no_ratio() -> None:
    estimates = Estimates()
    estimates.learn(ENDPOINT, Usage(2, 1), prompt_bytes=200, events=50, body_bytes=0)
    guess = estimates.usage(ENDPOINT, prompt_bytes=400, events=100, body_bytes=0)
    assert (guess.prompt_tokens, guess.completion_tokens) == (100, 100)


def test_memory_is_bounded_however_many_models_clients_name() -> None:
    estimates = Estimates()
    for number in range(MAX_LEARNT + 10):
        estimates.learn(("east", str(number)), Usage(9, 9), prompt_bytes=9, events=9, body_bytes=0)
    assert len(estimates._ratios) == MAX_LEARNT
