"""A replica whose worker dies takes its own requests with it and nobody else's."""

import asyncio
import contextlib
import multiprocessing
import os
import signal

import pytest
from support.models import tiny_config, whole_model

from dualray.actors.completion import Weights
from dualray.actors.engine import Engine, EngineState
from dualray.actors.plan_channel import PlanDoor
from dualray.actors.replicas import Replicas
from dualray.data.tokenizer import ByteTokenizer
from dualray.inference.plan import Owner, StepPlan
from dualray.inference.request import NotServingError, SamplingParams
from dualray.inference.scheduler import Limits, owners
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import StepRunner
from dualray.model.moe import LocalDispatch

LIMITS = Limits(num_blocks=64, block_size=4, max_batch=4, max_context=64)
PARAMS = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def work(replica: int, die_in_step: int, pipe) -> None:
    """A replica of one worker, which kills itself when it is given a certain step."""
    config = tiny_config(vocab_size=257, num_nextn_predict_layers=0)
    stage = StageRunner(
        whole_model(config),
        LocalDispatch(config.n_routed_experts),
        num_blocks=LIMITS.num_blocks,
        block_size=LIMITS.block_size,
    )
    runner = StepRunner(replica=replica, expert=0, stages={0: stage})

    def run(plan: StepPlan):
        assert all(owner.replica == replica for owner in plan.owners)
        if plan.step == die_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return runner.run(plan)

    door = PlanDoor("127.0.0.1", run)
    pipe.send(door.at)
    pipe.recv()  # until the test ends
    door.close()


@pytest.fixture
def start():
    """Starts replicas that die in the given steps; returns their doors."""
    context = multiprocessing.get_context("spawn")
    running = []

    def begin(*die_in_steps: int):
        for replica, step in enumerate(die_in_steps):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(replica, step, theirs))
            process.start()
            running.append((process, mine))
        return [pipe.recv() for _, pipe in running]

    yield begin
    for process, pipe in running:
        with contextlib.suppress(BrokenPipeError):  # of one that has killed itself
            pipe.send("end")
        process.join()


async def engine_over(doors) -> tuple[Engine, Replicas]:
    replicas = Replicas()
    await replicas.open(doors, len(doors))
    engine = Engine(
        model_name="tiny",
        tokenizer=ByteTokenizer(),
        owners=owners(len(doors), 1, 1),
        limits=LIMITS,
        max_request_s=60.0,
        run_step=replicas.run,
    )
    await engine.start()
    await engine.serve(Weights(training_step=1, digest="d"))
    return engine, replicas


async def outcome(completion) -> int | str:
    """Its tokens, or why it has none."""
    try:
        return len((await completion.whole()).tokens)
    except NotServingError as error:
        return str(error)


@pytest.mark.multiproc
def test_requests_of_the_lost_replica_end_and_the_others_go_on(start):
    doors = start(10, 0)

    async def scenario():
        engine, replicas = await engine_over(doors)
        first = [engine.submit(text, PARAMS) for text in ("abc", "def", "ghi", "jkl")]
        ended = await asyncio.gather(*map(outcome, first))
        later = [engine.submit(text, PARAMS) for text in ("mno", "pqr", "stu")]
        ended += await asyncio.gather(*map(outcome, later))
        found = (engine.state, dict(replicas.lost), engine.scheduler.free_blocks())
        engine.scheduler.check_pool()
        await engine.stop()
        replicas.close()
        return ended, found

    ended, (state, lost, free) = asyncio.run(scenario())
    sentence = (
        "the request's workers are gone, worker 0 is lost; send it again, the server has other "
        "workers."
    )
    assert sorted(ended[:4], key=str) == [40, 40, sentence, sentence]
    assert ended[4:] == [40, 40, 40]
    assert state is EngineState.SERVING
    assert lost == {0: "worker 0 is lost"}
    assert free == {Owner(replica=1, expert=0, direction=0): LIMITS.num_blocks}


@pytest.mark.multiproc
def test_with_the_last_replica_serving_ends(start):
    doors = start(3, 6)

    async def scenario():
        engine, replicas = await engine_over(doors)
        completions = [engine.submit(text, PARAMS) for text in ("abc", "def", "ghi", "jkl")]
        ended = await asyncio.gather(*map(outcome, completions))
        state = engine.state
        await engine.stop()
        replicas.close()
        return ended, state

    ended, state = asyncio.run(scenario())
    assert state is EngineState.FAILED
    assert all("worker 0 is lost" in text or "worker 1 is lost" in text for text in ended)
    assert any("worker 1 is lost" in text for text in ended)


@pytest.mark.multiproc
def test_both_lost_in_one_step_is_the_end(start):
    doors = start(2, 2)

    async def scenario():
        engine, replicas = await engine_over(doors)
        ended = await asyncio.gather(*(outcome(engine.submit(t, PARAMS)) for t in ("abc", "def")))
        state = engine.state
        await engine.stop()
        replicas.close()
        return ended, state

    ended, state = asyncio.run(scenario())
    assert state is EngineState.FAILED
    assert len(ended) == 2
    assert all("is lost" in text for text in ended)
