"""Which steps of a training are traced, and what their timelines and metrics say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from support.runs import make_corpus, write_run_file

from dualray.checkpoint.writer import Piece, write_rank
from dualray.data.dataset import TokenDataset
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.layout import Layout
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.spans import COMPUTE, SpanTuple
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.platform.events import EventLog
from dualray.platform.folder import RunFolder
from dualray.platform.metrics_log import MetricsLog, read_metrics
from dualray.platform.run_file import load_run_file, to_mapping
from dualray.platform.scheduling.choice import start_of
from dualray.platform.trace import Category, Trace, read_trace
from dualray.platform.training import Training
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import simulate

LAYOUT = Layout(pipeline=2, experts=2, schedule="1f1b")


class FakeGang:
    """Four workers that note what a simulation of their schedule would, if they are asked."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self.asked: list[bool] = []
        self.before_checkpoint: Trace | None = None

    def call(self, method: str, *args: Any) -> list[Any]:
        ranks = range(LAYOUT.world_size)
        if method == "step":
            self.asked.append(args[1])
            return [_result(_walk(rank) if args[1] else []) for rank in ranks]
        if method == "evaluate":
            return [HeldOut(loss_sum=1.0, targets=1)] * len(ranks)
        assert method == "write_checkpoint"
        if self._trace.exists():
            self.before_checkpoint = read_trace(self._trace)
        return [
            write_rank(Path(args[0]), rank, [Piece.whole(f"{rank}.weight", torch.ones(2))])
            for rank in ranks
        ]


def _walk(rank: int) -> list[SpanTuple]:
    row = simulate(make_schedule("1f1b", 2, 4)).rows[LAYOUT.coordinate(rank).pipeline]
    now = time.time()
    # A hundredth of the unit, so that the checkpoint of the same test comes behind it.
    return [(str(step), COMPUTE, now + 1e-4 * a, now + 1e-4 * b) for step, a, b in row]


def _result(spans: list[SpanTuple]) -> StepResult:
    return StepResult(
        loss=1.0, mtp_loss=[], balance_loss=0.0, grad_norm=1.0, lr=0.1, bubble=0.25,
        exposed_communication=0.125, step_time_s=0.1, loads={}, max_vio={},
        work=ExpertWork(slot_rows={}, seconds={}), cross_node_bytes=0, spans=spans,
    )  # fmt: skip


def train(folder: Path, monkeypatch, **settings: int) -> tuple[FakeGang, RunFolder]:
    monkeypatch.chdir(folder)
    layout = {"pipeline": 2, "experts": 2, "schedule": "1f1b"}
    corpus = make_corpus(folder / "corpus")
    path = write_run_file(
        folder / "tiny.yaml", corpus, layout=layout, train={"steps": 7} | settings
    )
    run = load_run_file(path)
    place = RunFolder.named(run.name)
    place.create(to_mapping(run))
    gang = FakeGang(place.trace)
    dataset = TokenDataset.open(run.data.path, verify=False)
    with MetricsLog.create(place.metrics) as log:
        training = Training(
            run,
            gang,
            place,
            EventLog(),
            log,
            dataset=dataset,
            first_step=0,
            start=start_of(run.layout, run.phases()[0], None),
            placement=contiguous_placement(run.model, run.layout.experts),
            nodes=None,
        )
        training.run(lambda: False)
    return gang, place


def test_evaluations_the_last_step_and_those_asked_for_are_traced(tmp_path, monkeypatch) -> None:
    gang, place = train(tmp_path, monkeypatch, eval_every=4, trace_every=3)
    assert gang.asked == [step in (3, 4, 6, 7) for step in range(1, 8)]
    steps = read_metrics(place.metrics).steps
    assert [step.bubble_simulated is not None for step in steps] == gang.asked
    # 1F1B idles (P - 1) / (m + P - 1), and the fake workers are a simulation themselves.
    assert abs(steps[-1].bubble_simulated - 1 / 5) < 1e-3
    assert {(step.bubble, step.exposed_communication) for step in steps} == {(0.25, 0.125)}


def test_a_checkpoint_behind_a_traced_step_is_added_to_its_timeline(tmp_path, monkeypatch) -> None:
    gang, place = train(tmp_path, monkeypatch)
    trace, before = read_trace(place.trace), gang.before_checkpoint
    assert before is not None
    assert trace.step == before.step == 7
    written = [span for span in trace.spans if span.category == Category.CHECKPOINT]
    assert [span.rank for span in sorted(written, key=lambda span: span.rank)] == [0, 1, 2, 3]
    assert min(span.start_s for span in written) > 0
    assert len(trace.spans) == len(before.spans) + 4
    assert trace.simulated == before.simulated


def test_a_checkpoint_behind_another_step_is_not(tmp_path, monkeypatch) -> None:
    # Step 6 writes a checkpoint and has no timeline, step 4 has both.
    gang, place = train(tmp_path, monkeypatch, steps=8, eval_every=4, checkpoint_every=6)
    assert gang.asked == [step in (4, 8) for step in range(1, 9)]
    assert gang.before_checkpoint is not None
    assert gang.before_checkpoint.step == 8
    assert read_trace(place.trace).step == 8
