"""How an engine stops serving and goes on: what accepted requests get, when workers are free."""

from __future__ import annotations

import asyncio

import pytest

from dualray.actors.completion import Weights
from dualray.actors.engine import Engine, EngineState
from dualray.actors.engine_pausing import PauseMode
from dualray.data.tokenizer import ByteTokenizer
from dualray.inference.plan import Owner, Sampled
from dualray.inference.request import (
    FinishReason,
    NotServingError,
    NoWeightsError,
    SamplingParams,
)
from dualray.inference.scheduler import Limits, owners

LIMITS = Limits(num_blocks=32, block_size=4, max_batch=4, max_context=32)


class Workers:
    """They answer with the letters of "hello", one step for each `step`, or all by themselves."""

    def __init__(self) -> None:
        self.computing = False
        self.num_steps = 0
        self._gate = asyncio.Semaphore(0)
        self._free = False

    def run_free(self) -> None:
        self._free = True
        self._gate.release()

    def step(self) -> None:
        self._gate.release()

    async def __call__(self, plan):
        self.computing = True
        if not self._free:
            await self._gate.acquire()
        await asyncio.sleep(0)
        self.computing = False
        self.num_steps += 1
        return [
            Sampled(
                request_id=s.request_id,
                token_id=b"hello"[(s.samples[-1].position - 1) % 5],
                logprob=-0.5,
                rank=1,
            )
            for sequences in plan.owners.values()
            for s in sequences
        ]


def serving(scenario):
    """Runs `scenario(engine, workers)` with a serving engine; no block may be left over."""

    async def whole():
        workers = Workers()
        engine = Engine(
            model_name="m",
            tokenizer=ByteTokenizer(),
            owners=owners(1, 1, 1),
            limits=LIMITS,
            max_request_s=60.0,
            run_step=workers,
        )
        await engine.start()
        await engine.serve(Weights(training_step=3, digest="d"))
        result = await asyncio.wait_for(scenario(engine, workers), 60)
        assert engine.scheduler.free_blocks() == {Owner(0, 0, 0): LIMITS.num_blocks}
        await engine.stop()
        return result

    return asyncio.run(whole())


def asked(engine: Engine, max_tokens: int = 4):
    return engine.submit("x", SamplingParams(temperature=0.0, max_tokens=max_tokens))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_who_is_not_done_when_a_drain_has_lasted_is_told():
    async def scenario(engine, workers):
        quick, slow = asked(engine, 1), asked(engine, 9)
        draining = asyncio.create_task(engine.drain(EngineState.PAUSED, 0.05))
        workers.step()
        assert (await quick.whole()).text == "h"
        await until(lambda: workers.computing)
        with pytest.raises(NotServingError) as raised:
            await slow.whole()
        # Its step is not done, so the workers are not free.
        await asyncio.sleep(0)
        assert (engine.state, draining.done()) == (EngineState.DRAINING, False)
        workers.step()
        assert await draining == 1
        assert (engine.state, workers.computing) == (EngineState.PAUSED, False)
        return str(raised.value), raised.value.retry_after_s

    assert serving(scenario) == (
        "model m stops serving and the completion did not end within 0.05 s; ask another server, "
        "or again when this one serves.",
        30.0,
    )


def test_a_drain_waits_for_the_step_of_a_request_that_was_cancelled():
    async def scenario(engine, workers):
        completion = asked(engine)
        await until(lambda: workers.computing)
        draining = asyncio.create_task(engine.drain())
        completion.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert (draining.done(), workers.computing) == (False, True)
        workers.step()
        assert await draining == 0
        return workers.computing

    assert serving(scenario) is False


def test_a_paused_generation_is_aborted():
    async def scenario(engine, workers):
        first, second = asked(engine), asked(engine)
        workers.step()
        await until(lambda: workers.num_steps == 1 and workers.computing)
        holding = asyncio.create_task(engine.pausing.hold(PauseMode.ABORT))
        answers = [await first.whole(), await second.whole()]
        assert not holding.done()
        workers.step()
        assert await holding == 2
        assert not workers.computing
        with pytest.raises(NotServingError, match="does not serve now, it is held"):
            asked(engine)
        await engine.pausing.go_on()
        workers.run_free()
        later = (await asked(engine).whole()).text
        return [(answer.text, answer.finish) for answer in answers], later

    assert serving(scenario) == ([("h", FinishReason.ABORT)] * 2, "hell")


def test_a_paused_generation_may_end_first():
    async def scenario(engine, workers):
        completion = asked(engine)
        holding = asyncio.create_task(engine.pausing.hold(PauseMode.WAIT))
        await engine.wait_for_change(EngineState.SERVING)
        workers.run_free()
        assert await holding == 1
        assert engine.state is EngineState.HELD
        return (await completion.whole()).text

    assert serving(scenario) == "hell"


def test_a_paused_generation_stands_still_and_goes_on():
    async def scenario(engine, workers):
        completion = asked(engine)
        workers.step()
        await until(lambda: workers.num_steps == 1 and workers.computing)
        holding = asyncio.create_task(engine.pausing.hold(PauseMode.KEEP))
        workers.run_free()
        assert await holding == 1
        steps = workers.num_steps
        for _ in range(50):
            await asyncio.sleep(0)
        assert (workers.num_steps, workers.computing) == (steps, False)
        await engine.pausing.go_on()
        return steps, (await completion.whole()).text

    assert serving(scenario) == (2, "hell")


def test_a_pause_may_become_another_one():
    async def scenario(engine, workers):
        workers.run_free()
        completion = asked(engine)
        assert await engine.pausing.hold(PauseMode.KEEP) == 1
        assert await engine.pausing.hold(PauseMode.ABORT) == 1
        assert (await completion.whole()).finish is FinishReason.ABORT
        await engine.pausing.go_on()
        await engine.pausing.go_on()  # nothing is paused
        return engine.state

    assert serving(scenario) is EngineState.SERVING


def test_whoever_wants_the_engine_to_serve_ends_a_pause_and_nothing_else():
    async def scenario(engine, workers):
        workers.run_free()
        assert not await engine.pausing.end_pause()
        await engine.pausing.hold(PauseMode.KEEP)
        assert await engine.pausing.end_pause()
        text = (await asked(engine).whole()).text
        await engine.drain()
        assert not await engine.pausing.end_pause()
        return text, engine.state

    assert serving(scenario) == ("hell", EngineState.TRAINING)


def test_who_waits_for_a_pause_is_released_when_it_is_taken_back():
    async def scenario(engine, workers):
        completion = asked(engine)
        waiting = asyncio.create_task(engine.pausing.hold(PauseMode.WAIT))
        await engine.wait_for_change(EngineState.SERVING)
        await engine.pausing.go_on()
        assert await waiting == 1  # though the request has not ended
        workers.run_free()
        return (await completion.whole()).text

    assert serving(scenario) == "hell"


@pytest.mark.parametrize("then", [EngineState.TRAINING, EngineState.PAUSED])
def test_leaving_serving_ends_what_stood_still(then):
    async def scenario(engine, workers):
        workers.run_free()
        completion = asked(engine)
        await engine.pausing.hold(PauseMode.KEEP)
        assert await engine.drain(then, 30.0) == 0
        assert engine.state is then
        with pytest.raises(NotServingError):
            await engine.pausing.go_on()
        return (await completion.whole()).text

    assert serving(scenario) == "hell"


def test_only_a_served_model_can_be_paused():
    async def scenario():
        engine = Engine(
            model_name="m",
            tokenizer=ByteTokenizer(),
            owners=owners(1, 1, 1),
            limits=LIMITS,
            max_request_s=60.0,
            run_step=Workers(),
            retry_after_s=2.5,
        )
        with pytest.raises(NoWeightsError):
            await engine.pausing.hold(PauseMode.ABORT)
        await engine.drain()
        with pytest.raises(NotServingError) as raised:
            await engine.pausing.hold(PauseMode.ABORT)
        return str(raised.value), raised.value.retry_after_s

    assert asyncio.run(scenario()) == (
        "model m does not serve now, it is training; watch the health service and try again.",
        2.5,
    )
