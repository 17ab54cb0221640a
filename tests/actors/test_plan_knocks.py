"""Strangers at a worker's port, and machines that vanish without a word."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest
from support.vanishing import across_a_cable

from dualray.actors.plan_channel import PlanChannels, PlanDoor
from dualray.errors import RunError
from dualray.inference.plan import StepPlan
from dualray.platform.bench.hosts import can_emulate_hosts

WITHIN_S = 60.0
"""For the loaded machine's sake; without the strangers it takes a millisecond."""


@contextmanager
def opened(run):
    door = PlanDoor("127.0.0.1", run)
    try:
        yield door
    finally:
        door.close()


def knock(door: PlanDoor) -> socket.socket:
    return socket.create_connection((door.at.host, door.at.port))


async def run_one(door: PlanDoor) -> list[object]:
    channels = PlanChannels()
    await channels.open([door.at])
    async with asyncio.timeout(WITHIN_S):
        answer = await channels.run(StepPlan(step=1, owners={}))
    channels.close()
    return answer


def test_silent_strangers_hold_up_nobody(monkeypatch):
    # They could stay for ever.
    monkeypatch.setattr("dualray.actors.plan_knocks._WITHIN_S", 1e6)
    with ExitStack() as stack, opened(lambda given: given.step) as door:
        strangers = [stack.enter_context(knock(door)) for _ in range(5)]
        assert asyncio.run(run_one(door)) == [1]
        for stranger in strangers:  # the engine is in: nobody else is listened to
            stranger.settimeout(WITHIN_S)
            assert stranger.recv(1) == b""


def test_a_dripping_stranger_holds_up_nobody_and_is_not_let_in(monkeypatch):
    monkeypatch.setattr("dualray.actors.plan_knocks._WITHIN_S", 1e6)
    ran, may_end = [], threading.Event()

    def drip(stranger: socket.socket) -> None:
        try:
            while not may_end.wait(0.01):
                stranger.send(b"x")
        except OSError:
            return

    with opened(lambda given: ran.append(given.step)) as door, knock(door) as stranger:
        dripping = threading.Thread(target=drip, args=(stranger,))
        dripping.start()
        assert asyncio.run(run_one(door)) == [None]
        may_end.set()
        dripping.join()
    assert ran == [1]


def test_who_takes_too_long_is_turned_away(monkeypatch):
    monkeypatch.setattr("dualray.actors.plan_knocks._WITHIN_S", 0.05)
    with opened(lambda given: given.step) as door, knock(door) as stranger:
        stranger.send(door.at.secret[:-1])
        stranger.settimeout(WITHIN_S)
        assert stranger.recv(1) == b""


def test_of_too_many_strangers_the_oldest_go(monkeypatch):
    monkeypatch.setattr("dualray.actors.plan_knocks._WITHIN_S", 1e6)
    monkeypatch.setattr("dualray.actors.plan_knocks._MOST", 3)
    with ExitStack() as stack, opened(lambda given: given.step) as door:
        strangers = [stack.enter_context(knock(door)) for _ in range(5)]
        for stranger in strangers[:2]:
            stranger.settimeout(WITHIN_S)
            assert stranger.recv(1) == b""
        strangers[2].setblocking(False)
        with pytest.raises(BlockingIOError):
            strangers[2].recv(1)
        assert asyncio.run(run_one(door)) == [1]


def test_the_secret_may_come_in_pieces_and_strangers_may_break_off():
    with opened(lambda given: given.step) as door:
        for _ in range(3):
            with knock(door) as stranger:  # closed with a reset
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with knock(door) as engine:
            engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in door.at.secret:
                engine.send(bytes([byte]))
            engine.send(b"\0" * 4)  # the beginning of a plan
            # The port takes whoever comes until the engine is in.
            with suppress(ConnectionRefusedError, ConnectionResetError):
                while True:
                    knock(door).close()


@pytest.mark.hosts
@pytest.mark.parametrize("is_computing", [True, False])
def test_a_worker_whose_node_vanishes_is_lost(monkeypatch, is_computing):
    """Its cable is pulled, so that there is no end of the connection and no reset."""
    if reason := can_emulate_hosts():
        pytest.skip(reason)
    monkeypatch.setattr(
        "dualray.actors.plan_knocks._KEEPALIVE",
        (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2)),
    )
    monkeypatch.setattr("dualray.actors.plan_knocks._UNANSWERED_MS", 2000)

    async def scenario(door, cable):
        channels = PlanChannels()
        await channels.open([door])
        if is_computing:
            # Longer than a vanished node has: its kernel answers for the worker meanwhile.
            assert await channels.run(StepPlan(step=5, owners={})) == [None]
        else:
            cable.pull()
        step = asyncio.create_task(channels.run(StepPlan(step=1000, owners={})))
        if is_computing:
            _, writing = await asyncio.wait([step], timeout=1)  # the plan has arrived by then
            assert writing
            cable.pull()
        with pytest.raises(RunError, match="worker 0 is lost"):
            async with asyncio.timeout(WITHIN_S):
                await step
        channels.close()

    with across_a_cable() as (door, cable):
        cable.on_engine_s_host(lambda: asyncio.run(scenario(door, cable)))
