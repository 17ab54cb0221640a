"""Pairs that take turns: same bits as one after the other, and really in turns."""

from __future__ import annotations

import gc
import hashlib
import time
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from support.models import random_batch, tiny_config, whole_model
from support.processes import free_port, run_ranks
from support.walks import make_walker

from dualray.model.config import ModelConfig
from dualray.parallel import exchange
from dualray.parallel.executor import Executor
from dualray.parallel.groups import leave
from dualray.parallel.layout import Layout
from dualray.parallel.micro_batch import Objective
from dualray.parallel.overlap import Strands
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.spans import COMMUNICATION
from dualray.parallel.weight_grads import WeightGrads

WORLD = 4
MICRO_BATCHES = 12
LAYOUTS = [
    Layout(pipeline=2, experts=2, schedule="dualpipe"),
    Layout(pipeline=2, experts=2, schedule="dualpipev"),
    Layout(pipeline=1, experts=4, schedule="dualpipev"),
]
MODES = [
    {"overlapped": False},
    {"overlapped": True},
    {"overlapped": False, "recompute": True},
    {"overlapped": True, "recompute": True},
]


def packed_batch(config: ModelConfig):
    """Micro-batches of one to three sequences of different lengths, 17 to 29 tokens in all."""
    packed = []
    for number in range(MICRO_BATCHES):
        lengths = ((9, 11, 5), (17,), (4, 25), (13, 13))[number % 4]
        ids, labels = random_batch(config, 1, sum(lengths), seed=number)
        packed.append((ids[0], labels[:, 0], lengths))
    return packed


def travel_slowly() -> None:
    """Let messages take 4 ms, longer than it takes to look whether one is here."""
    swap = exchange._swap

    def slow_swap(*message):
        time.sleep(0.004)
        return swap(*message)

    exchange._swap = slow_swap


def walk_modes(rank: int, config: ModelConfig, ports: list[int], dtype: torch.dtype):
    found = []
    travel_slowly()
    for layout in LAYOUTS:
        for mode in MODES:
            worker = make_walker(
                rank,
                config,
                layout,
                ports[len(found)],
                global_micro_batches=MICRO_BATCHES,
                dtype=dtype,
                **mode,
            )
            goal = Objective(main=1e-2, mtp=(3e-3, 3e-3), balance=1e-3)
            sums = worker.walk(packed_batch(config), goal)
            worker.executor.close()
            bits = {
                name: hashlib.sha256(parameter.main_grad.numpy().tobytes()).hexdigest()
                for name, parameter in worker.parameters().items()
            }
            losses = (sums.main, tuple(sums.mtp), sums.balance)
            loads = {layer: counts.tolist() for layer, counts in sums.loads.items()}
            found.append((losses, loads, bits, sums.spans.taken))
            leave()
    return found


def exchanges_within_pairs(spans) -> list[str]:
    """Per pair the kinds of its exchanges by start: f of the forward, b of the backward."""
    orders = []
    for name, category, start, end in spans:
        if "&" in name and category != COMMUNICATION:
            inside = sorted(
                (begin, "b" if "gradient" in what else "f")
                for what, kind, begin, _ in spans
                if kind == COMMUNICATION and start <= begin <= end
            )
            orders.append("".join(letter for _, letter in inside))
    return orders


@pytest.mark.multiproc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_overlapped_equals_sequential_bit_for_bit(dtype: torch.dtype) -> None:
    config = tiny_config(num_hidden_layers=8)
    ports = [free_port() for _ in range(len(LAYOUTS) * len(MODES))]
    by_rank = run_ranks(walk_modes, WORLD, config, ports, dtype)
    for at in range(len(LAYOUTS)):
        in_turns = 0
        for rank, found in enumerate(by_rank):
            sequential, overlapped, *recomputed = found[at * len(MODES) : (at + 1) * len(MODES)]
            for other in (overlapped, *recomputed):
                assert other[:3] == sequential[:3], (LAYOUTS[at], rank)
            orders = exchanges_within_pairs(overlapped[3])
            assert orders
            in_turns += sum(order.count("bf") > 1 for order in orders)
            assert not exchanges_within_pairs(sequential[3])
        # Each goes on before the other has ended. On a busy machine one rank may always come so
        # late that all messages are there, but hardly everyone.
        assert in_turns, LAYOUTS[at]


class Log:
    """Two strands that note each of their turns."""

    def __init__(self) -> None:
        self.prepared = 0
        self.strands = Strands(self._prepare)
        self.events: list[str] = []

    def _prepare(self) -> None:
        self.prepared += 1

    def strand(self, name: str, turns: int, fails_at: int | None = None):
        def work() -> None:
            try:
                for turn in range(turns):
                    self.events.append(f"{name}{turn}")
                    if turn == fails_at:
                        raise ValueError(name)
                    self.strands.hand_over()
            finally:
                self.events.append(f"{name} ends")

        return work


def idle(since: float) -> None:
    raise AssertionError("there was something to do")


@pytest.fixture
def log():
    made = Log()
    yield made
    made.strands.close()


def test_strands_take_turns_until_one_ends(log) -> None:
    log.strands.run(log.strand("a", 2), log.strand("b", 4))
    assert log.events == ["a0", "b0", "a1", "b1", "a ends", "b2", "b3", "b ends"]


def test_alone_a_strand_goes_on(log) -> None:
    log.strand("a", 3)()
    assert log.events == ["a0", "a1", "a2", "a ends"]


def test_turns_follow_messages(log) -> None:
    """Who has a message goes on; what was put off is done when both wait, piece by piece."""
    first, second = Future(), Future()
    pieces = ["p0", "p1"]

    def put_off() -> bool:
        if not pieces:
            return False
        log.events.append(pieces.pop(0))
        if not pieces:
            # The other strand's message comes while both wait.
            second.set_result(None)
        return True

    def one() -> None:
        log.strands.wait(first, put_off, idle)
        log.events.append("one")

    def two() -> None:
        log.events.append("two begins")
        log.strands.wait(second, put_off, idle)
        log.events.append("two")
        first.set_result(None)
        log.strands.wait(first, put_off, idle)
        log.events.append("two goes on")

    log.strands.run(one, two)
    assert log.events == ["two begins", "p0", "p1", "two", "two goes on", "one"]


def test_alone_a_strand_does_what_was_put_off_and_waits(log) -> None:
    message, pieces = Future(), [1, 2]

    def put_off() -> bool:
        pieces.pop()
        if not pieces:
            message.set_result(None)
        return True

    log.strands.wait(message, put_off, idle)
    assert not pieces


def test_one_thread_serves_all_pairs(log) -> None:
    for _ in range(3):
        log.strands.run(log.strand("a", 1), log.strand("b", 1))
    assert log.prepared == 1


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_failing_strand_unwinds_the_other(log, failing: str) -> None:
    fails = {name: 1 if name == failing else None for name in "ab"}
    with pytest.raises(ValueError, match=failing):
        log.strands.run(log.strand("a", 5, fails["a"]), log.strand("b", 5, fails["b"]))
    assert {"a ends", "b ends"} <= set(log.events)
    assert f"{failing}2" not in log.events
    # They can be used again.
    log.events.clear()
    log.strands.run(log.strand("a", 1), log.strand("b", 1))
    assert log.events == ["a0", "b0", "a ends", "b ends"]


def test_threads_do_not_keep_an_executor_alive() -> None:
    """Its weights must be free when a worker builds other stages."""
    stage = whole_model(tiny_config())
    held = SimpleNamespace(stages={0: stage}, hidden_size=24)
    executor = Executor(
        held, 0, PipelineLinks({}, (0,)), [], WeightGrads(), exchange=exchange.Exchange()
    )
    executor._strands.run(lambda: None, lambda: None)
    executor.close()
    gone = weakref.ref(executor)
    gc.disable()
    try:
        del executor
        assert gone() is None
    finally:
        gc.enable()
