"""Plans over real connections: who may send them, who answers, and who has gone."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
from contextlib import contextmanager, suppress

import pytest
from support.plan_workers import DoorWorker

from dualray.actors.plan_channel import PlanChannels, PlanDoor
from dualray.errors import RunError
from dualray.inference.plan import StepPlan


def plan(step: int) -> StepPlan:
    return StepPlan(step=step, owners={})


@contextmanager
def doors(*runs):
    opened = [PlanDoor("127.0.0.1", run) for run in runs]
    try:
        yield opened
    finally:
        for door in opened:
            door.close()


async def connected(opened) -> PlanChannels:
    channels = PlanChannels()
    await channels.open([door.at for door in opened])
    return channels


def test_every_worker_runs_every_plan_and_answers_come_by_rank():
    async def scenario(opened):
        channels = await connected(opened)
        answers = [await channels.run(plan(step)) for step in (1, 2, 3)]
        channels.close()
        return answers

    later = threading.Event()

    def slow(given):
        assert later.wait(30)
        return "a" * 200_000, given.step

    def quick(given):
        later.set()
        return given.step

    with doors(slow, quick) as opened:
        answers = asyncio.run(scenario(opened))
    assert answers == [[("a" * 200_000, step), step] for step in (1, 2, 3)]


def test_the_thread_that_runs_plans_is_prepared_once():
    threads = []

    def note(*plans):
        threads.append((len(plans), threading.get_ident()))

    async def scenario(door):
        channels = await connected([door])
        for number in (1, 2):
            await channels.run(plan(number))
        channels.close()

    door = PlanDoor("127.0.0.1", note, prepare=note)
    asyncio.run(scenario(door))
    door.close()
    assert [count for count, _ in threads] == [0, 1, 1]
    assert len({thread for _, thread in threads}) == 1


def test_who_does_not_know_the_secret_is_turned_away():
    ran = []
    with doors(ran.append) as (door,):
        with socket.create_connection((door.at.host, door.at.port)) as stranger:
            stranger.sendall(b"x" * 32 + b"\0" * 100)
            # Closed with what was sent unread, which the kernel may tell as a reset.
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        assert ran == []

        async def scenario():
            channels = await connected([door])
            await channels.run(plan(7))
            channels.close()

        asyncio.run(scenario())
        assert [each.step for each in ran] == [7]
        assert repr(door.at.secret) not in repr(door.at)


def test_a_worker_s_failure_is_told_and_the_next_plan_runs():
    def run(given):
        if given.step == 1:
            raise ValueError("no such block\nmore")
        return given.step

    async def scenario(opened):
        channels = await connected(opened)
        with pytest.raises(RunError) as failed:
            await channels.run(plan(1))
        answers = await channels.run(plan(2))
        channels.close()
        return str(failed.value), answers

    with doors(lambda given: given.step, run) as opened:
        sentence, answers = asyncio.run(scenario(opened))
    assert sentence == "worker 1 failed with ValueError: no such block; see its log."
    assert answers == [2, 2]


def _open_and_die(connection) -> None:
    door = PlanDoor("127.0.0.1", lambda given: os.kill(os.getpid(), signal.SIGKILL))
    connection.send(door.at)
    connection.recv()


@pytest.mark.multiproc
def test_of_a_dead_worker_and_its_failing_peers_the_death_is_told():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_open_and_die, args=(theirs,))
    process.start()

    def fails(given):
        raise ConnectionError("connection closed by peer")

    with doors(fails) as (door,):
        assert ours.poll(60)
        dying = ours.recv()

        async def scenario():
            channels = PlanChannels()
            await channels.open([door.at, dying])
            with pytest.raises(RunError, match="worker 1 is lost"):
                await channels.run(plan(1))
            with pytest.raises(RunError, match="worker 1 is lost"):
                await channels.run(plan(2))
            channels.close()
            with pytest.raises(RunError, match="worker 0 cannot be reached at"):
                await channels.open([dying])

        asyncio.run(scenario())
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_an_answer_that_nobody_waits_for_any_more_is_no_answer_to_the_next_plan():
    may_end = threading.Event()

    def run(given):
        if given.step == 1:
            assert may_end.wait(30)
        return given.step

    async def scenario(opened):
        channels = await connected(opened)
        task = asyncio.create_task(channels.run(plan(1)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_end.set()
        answers = await channels.run(plan(2))
        channels.close()
        return answers

    with doors(run) as opened:
        assert asyncio.run(scenario(opened)) == [2]


def test_closing_a_door_lets_the_step_under_way_end():
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def run(given):
        began.set()
        assert may_end.wait(30)
        ended.set()

    async def scenario(door):
        channels = await connected([door])
        step = asyncio.create_task(channels.run(plan(1)))
        await asyncio.to_thread(began.wait, 30)
        closing = asyncio.create_task(asyncio.to_thread(door.close))
        may_end.set()
        await closing
        assert ended.is_set()
        assert await step == [None]
        with pytest.raises(RunError, match="worker 0 is lost"):
            await channels.run(plan(2))
        channels.close()

    door = PlanDoor("127.0.0.1", run)
    asyncio.run(scenario(door))


def test_a_door_nobody_came_to_closes_and_a_worker_opens_another_one():
    worker = DoorWorker(lambda given: given.step)
    first = asyncio.run(worker.open_plans.remote("node"))
    second = asyncio.run(worker.open_plans.remote("node"))
    assert first.secret != second.secret
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((first.host, first.port)).close()
    assert worker.door is not None
    worker.door.close()
