"""A completion whose deltas come no sooner than an interval after each other."""

from __future__ import annotations

import asyncio

import pytest

from dualray.actors import completion as module
from dualray.actors.completion import Completion, Weights
from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import RunError
from dualray.inference.detokenizer import IncrementalText
from dualray.inference.plan import Sampled
from dualray.inference.request import FinishReason, Request, SamplingParams
from dualray.inference.scheduler import Progress


class Clock:
    """What `time.monotonic_ns` of the module reads."""

    def __init__(self, monkeypatch) -> None:
        self.now_s = 5.0
        monkeypatch.setattr(module.time, "monotonic_ns", lambda: round(self.now_s * 1e9))


def a_completion(*, stop: str = "!", **options) -> Completion:
    request = Request(request_id="r", prompt_ids=(1,), params=SamplingParams(max_tokens=9), seed=0)
    weights = Weights(training_step=0, digest="")
    text = IncrementalText(ByteTokenizer(), stop=(stop,))
    return Completion(request, text, weights, lambda completion: None, **options)


def token(letter: str, finish: FinishReason | None = None) -> Progress:
    sampled = Sampled(request_id="r", token_id=ord(letter), logprob=-1.0, rank=1)
    return Progress(request_id="r", sampled=sampled, finish=finish)


async def deltas_of(completion: Completion) -> list[tuple[str, int]]:
    return [(delta.text, len(delta.tokens)) async for delta in completion]


@pytest.mark.parametrize("every_token", [False, True])
def test_tokens_made_within_the_interval_come_together(monkeypatch, every_token):
    clock = Clock(monkeypatch)
    completion = a_completion(interval_s=0.05, every_token=every_token)
    for at_s, letter in [(5.0, "a"), (5.02, "b"), (5.049, "c"), (5.05, "d"), (5.06, "e")]:
        clock.now_s = at_s
        assert completion.take(token(letter)) is None
    assert completion.take(token("f", FinishReason.LENGTH)) is FinishReason.LENGTH
    assert asyncio.run(deltas_of(completion)) == [("a", 1), ("bcd", 3), ("ef", 2)]


def test_without_an_interval_each_comes_by_itself():
    completion = a_completion()
    for letter in "abc":
        completion.take(token(letter))
    assert completion.take(token("!")) is FinishReason.STOP
    assert asyncio.run(deltas_of(completion)) == [("a", 1), ("b", 1), ("c", 1), ("", 1)]


def test_what_is_held_comes_before_an_error_and_with_an_abort(monkeypatch):
    Clock(monkeypatch)
    failed, aborted = (a_completion(interval_s=1.0) for _ in range(2))
    for letter in "abc":
        failed.take(token(letter))
        aborted.take(token(letter))
    failed.fail(RunError("it broke", hint="mend it"))
    aborted.abort()

    async def read():
        deltas = aiter(failed)
        seen = [(await anext(deltas)).text, (await anext(deltas)).text]
        with pytest.raises(RunError, match="it broke"):
            await anext(deltas)
        return seen

    assert asyncio.run(read()) == ["a", "bc"]
    assert asyncio.run(deltas_of(aborted)) == [("a", 1), ("bc", 2)]


@pytest.mark.parametrize("ends", ["abort", "fail"])
def test_what_looked_like_a_stop_string_comes_with_the_end(ends):
    """Its tokens have come, so that its text must not stay away."""
    completion = a_completion(every_token=True, stop="!!!")
    for letter in "a!!":
        completion.take(token(letter))
    if ends == "abort":
        completion.abort()
        assert asyncio.run(deltas_of(completion)) == [("a", 1), ("", 1), ("", 1), ("!!", 0)]
    else:
        completion.fail(RunError("it broke", hint="mend it"))
        given: list[tuple[str, int]] = []

        async def read() -> None:
            async for delta in completion:
                given.append((delta.text, len(delta.tokens)))  # noqa: PERF401 (it raises)

        with pytest.raises(RunError, match="it broke"):
            asyncio.run(read())
        assert given == [("a", 1), ("", 1), ("", 1), ("!!", 0)]
