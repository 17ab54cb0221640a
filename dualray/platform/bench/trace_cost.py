"""What a timeline costs a step: steps with one beside steps without, in the same processes.

Four ranks train the demo's model in the demo's layout. Steps alternate, so that a machine that
slows down slows both kinds. With a timeline is what a traced step of a run does: spans are noted,
sent to one process with the step's result, and written to a file together with the simulated
schedule. Without, only the result is sent and nothing is noted at all, which no run does: noting
is too cheap to have a switch.

Steps vary by more than a timeline costs, even in pairs and even in the processor time of all
ranks together, which other work on the machine disturbs less. So the parts of a timeline's work are
also timed by themselves, and their share of the median step is the figure to believe.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from dualray.model.config import ModelConfig
from dualray.parallel.exchange import Exchange
from dualray.parallel.layout import Layout
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.spans import Spans, SpanTuple
from dualray.parallel.step_result import StepResult
from dualray.parallel.train_config import TrainConfig
from dualray.parallel.trainer import Trainer
from dualray.platform.bench.hosts import LOOPBACK
from dualray.platform.bench.ranks import Member, run_ranks
from dualray.platform.timeline import step_trace
from dualray.platform.trace import write_trace
from dualray.schedule.make import make_schedule

_LAYOUT = Layout(pipeline=2, experts=2, schedule="dualpipe")
_REPETITIONS = 50
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the ranks train, and how often."""

    model: ModelConfig
    train: TrainConfig
    warmup: int
    """Pairs of steps before the measured ones."""
    pairs: int


@dataclass(frozen=True)
class _Window:
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _RandomTokens:
    """A `TokenSource` of uniform ids; what they are changes no duration."""

    model: ModelConfig
    seq_len: int

    def sequences(
        self, step: int, first: int, count: int, global_sequences: int, split: str = "train"
    ) -> _Window:
        depths = 1 + self.model.num_nextn_predict_layers
        draws = np.random.default_rng([step, first])
        window = draws.integers(self.model.vocab_size, size=(count, self.seq_len + depths))
        labels = [window[:, depth + 1 : depth + 1 + self.seq_len] for depth in range(depths)]
        return _Window(ids=window[:, : self.seq_len], labels=np.stack(labels))


def measure(task: Task) -> dict[str, Any]:
    """Both kinds of step, pair by pair, and the parts of a timeline."""
    found = run_ranks(run, task, [LOOPBACK] * _LAYOUT.world_size, timeout_s=_TIMEOUT_S)
    spans = found[0].spans
    step_s = median(found[0].without.wall_s)
    parts = parts_of(spans, task)
    return {
        "step_s": step_s,
        "pairs": task.pairs,
        "wall_ratio": _ratio(found[0].traced.wall_s, found[0].without.wall_s),
        "cpu_ratio": _ratio(
            _summed(rank.traced.cpu_s for rank in found),
            _summed(rank.without.cpu_s for rank in found),
        ),
        "spans": sum(map(len, spans)),
        "parts": parts,
        "share_noting": parts["noting_s"] / step_s,
        "share": sum(parts.values()) / step_s,
    }


@dataclass(frozen=True)
class Seconds:
    """Of every measured step, one after the other."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Processor time of the rank, all its threads."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rank has measured."""

    traced: Seconds
    without: Seconds
    spans: list[list[SpanTuple]]
    """Every worker's in the last traced step; at rank 0 alone."""


def run(member: Member, task: Task) -> Found:
    """What every rank does."""
    trainer = Trainer(
        model=task.model,
        layout=_LAYOUT,
        train=task.train,
        placement=contiguous_placement(task.model, _LAYOUT.experts),
        rank=member.rank,
        rendezvous=member.rendezvous,
        seed=0,
        device=torch.device("cpu"),
        hosted=member.hosted,
    )
    source = _RandomTokens(task.model, task.train.seq_len)
    taken = {True: Seconds(), False: Seconds()}
    spans: list[list[SpanTuple]] = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(task.warmup + task.pairs):
            for traced in (True, False) if pair % 2 else (False, True):
                dist.barrier()
                started, cpu = time.perf_counter(), time.process_time()
                with nullcontext() if traced else _silence():
                    result = trainer.step(pair, source)
                results = _gathered(result, member)
                if traced and member.rank == 0:
                    spans = [one.spans for one in results]
                    _write(spans, task, Path(folder))
                dist.barrier()
                if pair >= task.warmup:
                    taken[traced].wall_s.append(time.perf_counter() - started)
                    taken[traced].cpu_s.append(time.process_time() - cpu)
    trainer.close()
    return Found(traced=taken[True], without=taken[False], spans=spans)


def parts_of(spans: Sequence[Sequence[SpanTuple]], task: Task) -> dict[str, float]:
    """Median seconds of each thing that a timeline with these spans needs, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        writing_s = _median_s(lambda: _write(spans, task, Path(folder)))
    return {
        "noting_s": max(_median_s(partial(_note, own)) for own in spans),
        "sending_s": _median_s(lambda: pickle.loads(pickle.dumps(spans))),
        "writing_s": writing_s,
    }


def _ratio(traced: Sequence[float], without: Sequence[float]) -> dict[str, float]:
    """Median over the pairs, and its quartiles."""
    low, middle, high = quantiles([one / other for one, other in zip(traced, without)], n=4)
    return {"median": middle, "low": low, "high": high}


def _summed(ranks: Iterable[Sequence[float]]) -> list[float]:
    return [sum(step) for step in zip(*ranks)]


@contextmanager
def _silence() -> Iterator[None]:
    """No span is noted, and no exchange is asked when it arrived."""
    nowhere = property(lambda self: None, lambda self, value: None)
    with (
        patch.object(Spans, "add", lambda *_: None),
        patch.object(Exchange, "spans", nowhere, create=True),
    ):
        yield


def _gathered(own: StepResult, member: Member) -> list[StepResult]:
    everyone: list[Any] | None = [None] * _LAYOUT.world_size if member.rank == 0 else None
    dist.gather_object(own, everyone)
    return everyone or []


def _write(spans: Sequence[Sequence[SpanTuple]], task: Task, folder: Path) -> None:
    schedule = make_schedule(_LAYOUT.schedule, _LAYOUT.pipeline, task.train.micro_batches)
    trace = step_trace(spans, step=1, layout=_LAYOUT, schedule=schedule)
    write_trace(folder / "trace.json", trace)


def _note(own: Sequence[SpanTuple]) -> None:
    spans = Spans()
    for name, category, _, _ in own:
        with spans.noted(name, category):
            pass


def _median_s(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return median(seconds)
