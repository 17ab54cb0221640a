"""What a run writes about its experts: tables by place, MaxVio over the run, kill and resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import make_corpus, write_run_file

from dualray.checkpoint.writer import Piece, write_rank
from dualray.data.dataset import TokenDataset
from dualray.errors import RunError
from dualray.parallel.balance import max_violation
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.layout import Layout
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.platform.events import EventLog
from dualray.platform.folder import RunFolder
from dualray.platform.loads import loads_files
from dualray.platform.metrics import StepMetrics
from dualray.platform.metrics_log import MetricsLog, read_metrics
from dualray.platform.report import write_report
from dualray.platform.run_file import RunFile, load_run_file, to_mapping
from dualray.platform.scheduling.choice import start_of
from dualray.platform.training import Training

LAYOUT = Layout(pipeline=2, experts=2, schedule="dualpipe")
NODES = ("10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.3")
"""Of the workers: expert rank 1 is on two nodes, as its stages are."""


class FakeGang:
    """Workers of which everyone holds every layer, and whose slots get made-up rows."""

    def __init__(self, run: RunFile, fails_at: int = 0) -> None:
        self.infos = [SimpleNamespace(node=node) for node in NODES]
        self._fails_at = fails_at
        self._layers = run.model.moe_layers
        self._num_experts = run.model.n_routed_experts

    def rows(self, step: int, worker: int) -> dict[int, list[int]]:
        drawn = np.random.default_rng((step, worker))
        shape = self._num_experts // 2
        return {layer: drawn.integers(50, size=shape).tolist() for layer in self._layers}

    def load(self, step: int, layer: int) -> np.ndarray:
        """(E,): workers 0 and 2 have the first half of the experts."""
        first, second = (
            sum(np.array(self.rows(step, worker)[layer]) for worker in pair)
            for pair in ((0, 2), (1, 3))
        )
        return np.concatenate([first, second])

    def call(self, method: str, *args: Any) -> list[Any]:
        if method == "step":
            if args[0] + 1 == self._fails_at:
                raise RunError("worker 1 died during step", hint="see its log")
            return [self._result(args[0] + 1, worker) for worker in range(4)]
        if method == "evaluate":
            return [HeldOut(loss_sum=1.0, targets=1)] * 4
        assert method == "write_checkpoint"
        return [
            write_rank(Path(args[0]), rank, [Piece.whole(f"{rank}.weight", torch.ones(2))])
            for rank in range(4)
        ]

    def _result(self, step: int, worker: int) -> StepResult:
        loads = {layer: self.load(step, layer) for layer in self._layers}
        return StepResult(
            loss=1.0, mtp_loss=[], balance_loss=0.0, grad_norm=1.0, lr=0.1, bubble=0.0,
            exposed_communication=0.0, step_time_s=0.1,
            loads={layer: load.tolist() for layer, load in loads.items()},
            max_vio={k: max_violation(torch.from_numpy(load)) for k, load in loads.items()},
            work=ExpertWork(slot_rows=self.rows(step, worker), seconds={}),
            cross_node_bytes=0, spans=[],
        )  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFile:
    monkeypatch.chdir(tmp_path)
    layout = {"pipeline": 2, "experts": 2, "schedule": "dualpipe"}
    path = write_run_file(
        tmp_path / "tiny.yaml", make_corpus(tmp_path / "corpus"), layout=layout,
        train={"steps": 9, "eval_every": 3, "checkpoint_every": 4},
    )  # fmt: skip
    return load_run_file(path)


def train(run: RunFile, gang: FakeGang, first_step: int = 0) -> RunFolder:
    place = RunFolder.named(run.name)
    place.create(to_mapping(run))
    with MetricsLog.resume(place.metrics, first_step) as log:
        Training(
            run, gang, place, EventLog(), log,
            dataset=TokenDataset.open(run.data.path, verify=False), first_step=first_step,
            start=start_of(run.layout, run.phases()[0], None),
            placement=contiguous_placement(run.model, 2), nodes=None,
        ).run(lambda: False)  # fmt: skip
    return place


def check(run: RunFile, place: RunFolder, gang: FakeGang, steps: int) -> None:
    """Tables and metrics of the first `steps` steps, computed anew."""
    rows = [row for file in loads_files(place.loads) for row in file.read().to_pylist()]
    placement = contiguous_placement(run.model, 2)
    expected: dict[tuple, int] = {}
    for step in range(1, steps + 1):
        for worker, node in enumerate(NODES):
            rank = LAYOUT.coordinate(worker).expert
            for layer, counts in gang.rows(step, worker).items():
                for expert, count in zip(placement.held[layer][rank], counts):
                    key = (step, layer, expert, rank, node)
                    expected[key] = expected.get(key, 0) + count
    assert {tuple(row.values())[:5]: row["tokens"] for row in rows} == expected
    assert len(rows) == len(expected)
    metrics = read_metrics(place.metrics).steps
    assert [step.step for step in metrics] == list(range(1, steps + 1))
    summed = {layer: np.zeros(run.model.n_routed_experts) for layer in run.model.moe_layers}
    for step in metrics:
        for layer in summed:
            summed[layer] += gang.load(step.step, layer)
        vio = {k: float(load.max() / load.mean() - 1) for k, load in summed.items()}
        assert step.max_vio_run_per_layer == pytest.approx(vio, rel=1e-12)
        assert step.max_vio_run == pytest.approx(max(vio.values()), rel=1e-12)
    assert metrics[0].max_vio == pytest.approx(metrics[0].max_vio_run, rel=1e-12)
    assert metrics[-1].max_vio_run < metrics[-1].max_vio


def test_a_run_says_who_computed_what(run: RunFile) -> None:
    gang = FakeGang(run)
    place = train(run, gang)
    check(run, place, gang, 9)
    assert [file.last for file in loads_files(place.loads)] == [9]
    text = write_report(place.path).read_text(encoding="utf-8")
    assert "load of every expert rank" in text
    assert "10.0.0.3" in text


def test_a_run_that_fails_leaves_the_loads_of_its_steps_and_is_resumed(run: RunFile) -> None:
    """Step 7 fails; the checkpoint is of step 4, and steps 5 to 9 are made anew."""
    gang = FakeGang(run, fails_at=7)
    with pytest.raises(RunError, match="worker 1 died"):
        train(run, gang)
    place = RunFolder.named(run.name)
    check(run, place, gang, 6)
    again = FakeGang(run)
    train(run, again, first_step=4)
    check(run, place, again, 9)


def test_a_checkpoint_has_the_loads_of_its_steps(run: RunFile, monkeypatch) -> None:
    gang, seen = FakeGang(run), []
    call = gang.call

    def noted(method: str, *args: Any) -> list[Any]:
        if method == "write_checkpoint":
            seen.append([file.last for file in loads_files(RunFolder.named(run.name).loads)])
        return call(method, *args)

    monkeypatch.setattr(gang, "call", noted)
    train(run, gang)
    assert seen == [[4], [8], [9]]


def test_a_run_resumed_without_tables_counts_from_there(run: RunFile) -> None:
    gang = FakeGang(run)
    place = train(run, gang)
    for file in loads_files(place.loads):
        file.path.unlink()
    train(run, gang, first_step=8)
    last: StepMetrics = read_metrics(place.metrics).steps[-1]
    assert last.step == 9
    assert last.max_vio_run == pytest.approx(last.max_vio, rel=1e-12)
