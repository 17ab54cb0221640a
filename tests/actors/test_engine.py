"""The engine's loop with hand-made workers: what callers get, and when blocks come back."""

import asyncio

import pytest
from support.plan_workers import DoorWorker

from dualray.actors.completion import Weights
from dualray.actors.engine import Engine, EngineState
from dualray.actors.engine_actor import EngineActor
from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import RequestError
from dualray.inference.plan import Owner, Sampled
from dualray.inference.request import (
    DeadlineError,
    FinishReason,
    NotServingError,
    SamplingParams,
    ServerFaultError,
)
from dualray.inference.scheduler import Limits, owners
from dualray.inference.serve_config import ServeConfig
from dualray.platform.client import Client

OWNER = Owner(0, 0, 0)
LIMITS = Limits(num_blocks=32, block_size=4, max_batch=4, max_context=32)


class Script:
    """Workers that answer every request with the bytes of `text`, over and over."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.plans = []

    async def __call__(self, plan):
        self.plans.append(plan)
        await asyncio.sleep(0)
        return [
            Sampled(
                request_id=s.request_id,
                token_id=self.text[(s.samples[-1].position - 1) % len(self.text)],
                logprob=-0.5,
                rank=1,
            )
            for sequences in plan.owners.values()
            for s in sequences
        ]


def make(script, **changes) -> Engine:
    values = {
        "model_name": "m",
        "tokenizer": ByteTokenizer(),
        "owners": owners(1, 1, 1),
        "limits": LIMITS,
        "max_request_s": 60.0,
        "run_step": script,
    }
    return Engine(**(values | changes))


def run(scenario, script, **changes):
    """Runs `scenario(engine)` with a serving engine; nothing may be left over."""

    async def whole():
        engine = make(script, **changes)
        await engine.start()
        await engine.serve(Weights(training_step=3, digest="d"))
        result = await scenario(engine)
        assert engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}
        await engine.stop()
        return result

    return asyncio.run(whole())


def params(**values) -> SamplingParams:
    return SamplingParams(**values)


def test_deltas_end_with_the_reason():
    async def scenario(engine):
        return [d async for d in engine.submit("x", params(max_tokens=3))]

    deltas = run(scenario, Script("hello"))
    assert [d.text for d in deltas] == ["h", "e", "l"]
    assert [d.finish for d in deltas] == [None, None, FinishReason.LENGTH]


def test_tokens_of_a_character_come_together():
    async def scenario(engine):
        return [d async for d in engine.submit("x", params(max_tokens=4))]

    deltas = run(scenario, Script("\u20aca"))
    assert [(d.text, len(d.tokens)) for d in deltas] == [("\u20ac", 3), ("a", 1)]


def test_a_stop_string_ends_it_before_its_length():
    async def scenario(engine):
        return await engine.submit("x", params(max_tokens=20, stop=("lo",))).whole()

    script = Script("hello")
    delta = run(scenario, script)
    assert (delta.text, delta.finish, delta.matched_stop) == ("hel", FinishReason.STOP, "lo")
    assert len(script.plans) == 5


def test_min_tokens_outlasts_a_stop_string():
    async def scenario(engine):
        return await engine.submit("x", params(max_tokens=9, stop=("l",), min_tokens=4)).whole()

    # The l's at places 3 and 4 are allowed; the next one is at place 8.
    assert run(scenario, Script("hello")).text == "hellohe"


def test_the_end_of_sequence_is_no_text():
    async def scenario(engine):
        return await engine.submit("x", params(stop_token_ids=(ord("l"),))).whole()

    delta = run(scenario, Script("hello"))
    assert (delta.text, delta.finish, len(delta.tokens)) == ("he", FinishReason.STOP, 3)


def test_cancelling_frees_at_once():
    async def scenario(engine):
        completion = engine.submit("x", params(max_tokens=20))
        async for _ in completion:
            break
        assert engine.scheduler.free_blocks()[OWNER] < LIMITS.num_blocks
        completion.cancel()
        assert engine.scheduler.free_blocks()[OWNER] == LIMITS.num_blocks
        completion.cancel()
        return engine.stats

    stats = run(scenario, Script("hello"))
    assert (stats.num_succeeded, stats.num_failed) == (0, 1)


@pytest.mark.parametrize(("own", "server"), [(0.01, 60.0), (None, 0.01)])
def test_time_runs_out_while_a_step_hangs(own, server):
    async def scenario(engine):
        completion = engine.submit("x", params(), timeout_s=own)
        with pytest.raises(DeadlineError) as raised:
            await completion.whole()
        return str(raised.value)

    async def hang(plan):
        await asyncio.Event().wait()

    assert run(scenario, hang, max_request_s=server) == (
        "the request's time ran out before its completion ended; allow more time or ask for "
        "fewer tokens."
    )


def test_draining_lets_accepted_requests_end():
    async def scenario(engine):
        accepted = engine.submit("x", params(max_tokens=4))
        draining = asyncio.create_task(engine.drain())
        assert await engine.wait_for_change(EngineState.SERVING) is EngineState.DRAINING
        with pytest.raises(NotServingError) as raised:
            engine.submit("y", params())
        assert "does not serve now, it is draining" in str(raised.value)
        await draining
        assert engine.state is EngineState.TRAINING
        assert (await accepted.whole()).text == "hell"
        await engine.serve(Weights(training_step=4, digest="e"))
        later = engine.submit("x", params(max_tokens=1))
        await later.whole()
        return accepted.weights.training_step, later.weights.training_step

    assert run(scenario, Script("hello")) == (3, 4)


def test_stopping_tells_whoever_waits():
    async def scenario():
        async def hang(plan):
            await asyncio.Event().wait()

        engine = make(hang)
        await engine.start()
        await engine.serve(Weights(training_step=3, digest="d"))
        completion = engine.submit("x", params())
        await engine.stop()
        with pytest.raises(NotServingError, match="the server is stopping"):
            await completion.whole()

    asyncio.run(scenario())


def test_a_bug_of_the_engine_tells_whoever_waits():
    class Broken(ByteTokenizer):
        def decode(self, ids, **_):
            if ord("a") in ids:  # the prompt has none
                raise KeyError("oops")
            return "x"

    async def scenario(engine):
        with pytest.raises(ServerFaultError) as raised:
            await engine.submit("x", params()).whole()
        assert engine.state is EngineState.FAILED
        return str(raised.value)

    assert run(scenario, Script("a"), tokenizer=Broken()) == (
        "the engine failed: KeyError: 'oops'; see the engine's log."
    )


def test_a_failed_engine_does_not_come_back():
    """Its loop has ended: a request that it accepted would wait for its deadline."""

    async def lose(plan):
        raise ConnectionError("gone")

    async def scenario(engine):
        with pytest.raises(NotServingError, match="the workers failed in step 1"):
            await engine.submit("x", params()).whole()
        await engine.drain()
        assert engine.state is EngineState.FAILED
        with pytest.raises(NotServingError) as raised:
            await engine.serve(Weights(training_step=4, digest="e"))
        return str(raised.value)

    assert run(scenario, lose) == (
        "model m cannot serve again, its engine has failed; start the run again."
    )


def test_a_refused_request_leaves_nothing_behind():
    async def scenario(engine):
        for prompt, given in (
            ("", params()),
            ("x" * 32, params()),
            ("x", params(stop_token_ids=(300,))),
        ):
            with pytest.raises(RequestError):
                engine.submit(prompt, given)
        return engine.stats

    assert run(scenario, Script("a")).prompt_tokens == 0


def test_the_actor_asks_every_worker_and_joins_their_tokens():
    """`EngineActor` without Ray: a worker is whatever has `open_plans.remote`."""
    script = Script("hello")

    async def scenario():
        workers = [
            DoorWorker(lambda plan: []),
            DoorWorker(lambda plan: asyncio.run(script(plan))),
        ]
        actor = EngineActor(
            model_name="m",
            tokenizer=ByteTokenizer(),
            owners=owners(1, 1, 1),
            limits=LIMITS,
            config=ServeConfig(port=0),
            workers=workers,
        )
        target = await actor.start()
        assert target.startswith("127.0.0.1:")
        await actor.serve(3, "d", owners(1, 1, 1))

        def ask():
            with Client(target) as client:
                return "".join(client.generate("x", {"max_tokens": 5}))

        text = await asyncio.to_thread(ask)
        stats = await actor.stats()
        await actor.stop(grace_s=0)
        return text, [w.num_calls for w in workers], stats

    text, calls, stats = asyncio.run(scenario())
    assert (text, calls) == ("hello", [5, 5])
    assert (stats["state"], stats["training_step"], stats["cache_usage"]) == ("serving", 3, 0.0)


def test_counters_count():
    async def scenario(engine):
        await asyncio.gather(*(engine.submit("xy", params(max_tokens=3)).whole() for _ in range(2)))
        return engine.stats

    stats = run(scenario, Script("hello"))
    assert (stats.num_succeeded, stats.num_started, stats.num_steps) == (2, 2, 3)
    assert (stats.prompt_tokens, stats.generation_tokens) == (4, 6)
    assert stats.first_token_unix_s is not None
