"""What a run does with the balancer's proposals: carry out, record, remember, refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.runs import write_run_file

from dualray.actors.gang import WorkerLostError
from dualray.actors.stage_worker import WorkerInfo
from dualray.errors import ConfigError
from dualray.parallel.expert_groups import Moved
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import from_plain
from dualray.parallel.step_result import StepResult
from dualray.platform.events import EventLog, Note
from dualray.platform.expert_moves import ExpertMoves, imbalance, refuse_too_many_copies
from dualray.platform.metrics_log import MetricsLog, read_metrics
from dualray.platform.run_file import RunFile, load_run_file
from dualray.platform.scheduling.choice import choice_of
from dualray.schedule.make import make_schedule

EXPERTS = {"rebalance_every": 2, "min_gain": 0.0, "link_bytes_per_s": 1e12}


class FakeGang:
    """Workers that move experts, or are lost when they are to."""

    def __init__(self, lost: bool = False) -> None:
        self.lost, self.placements = lost, []

    def call(self, method: str, placement: Any) -> list[Moved]:
        assert method == "move_experts"
        if self.lost:
            raise WorkerLostError("worker 3 died during move_experts", hint="see its log")
        self.placements.append(placement)
        return [Moved(layers=(1,), received_bytes=1000 * rank, seconds=0.1) for rank in range(4)]


def run_of(tmp_path: Path, **experts: Any) -> RunFile:
    sections = {"experts": EXPERTS | experts} if experts or EXPERTS else {}
    return load_run_file(write_run_file(tmp_path / "tiny.yaml", tmp_path / "none", **sections))


def results(run: RunFile, hot: float) -> list[StepResult]:
    """Of four workers: rank 0's first two experts get `hot` times what the others get."""
    layers = run.model.moe_layers
    rows = {0: [int(100 * hot), int(100 * hot), 100, 100], 1: [100, 100, 100, 100]}
    return [
        StepResult(
            loss=1.0, mtp_loss=[], balance_loss=0.0, grad_norm=1.0, lr=0.1, bubble=0.0,
            exposed_communication=0.0, step_time_s=0.1, loads={}, max_vio={}, spans=[],
            work=ExpertWork(
                slot_rows=dict.fromkeys(layers, rows[rank % 2]),
                seconds=dict.fromkeys(layers, sum(rows[rank % 2]) / 1e4),
            ),
            cross_node_bytes=0,
        )
        for rank in range(4)
    ]  # fmt: skip


def moves(run: RunFile, gang: FakeGang, tmp_path: Path, nodes: NodeMap | None = None):
    log, events = MetricsLog.create(tmp_path / "metrics.jsonl"), EventLog()
    placement = run.experts.first_placement(run.model, run.layout)
    return ExpertMoves(run, gang, events, log, placement=placement, nodes=nodes), events


def notes_of(events: EventLog) -> list[str]:
    return [event.text for event in events.read(0, 0.0) if isinstance(event, Note)]


def schedule_of(run: RunFile):
    return make_schedule(run.layout.schedule, run.layout.pipeline, run.train.micro_batches)


def test_experts_move_when_it_pays_and_the_run_says_so(tmp_path: Path) -> None:
    run, gang = run_of(tmp_path), FakeGang()
    experts, events = moves(run, gang, tmp_path)
    first = experts.placement
    for step in (1, 2):
        assert not gang.placements
        experts.after(results(run, 3.0), step, run.layout, schedule_of(run))
    assert gang.placements == [experts.placement]
    assert experts.placement != first
    assert from_plain(experts.remembered) == experts.placement
    [moved] = read_metrics(tmp_path / "metrics.jsonl").migrations
    assert (moved.step, moved.num_bytes, moved.seconds) == (2, 6000, 0.1)
    assert moved.imbalance_after < 1.2 < moved.imbalance_before
    [note] = notes_of(events)
    assert note.startswith("experts after step 2: ")
    # Balanced loads give no reason to move again, and that is said too.
    for step in (3, 4):
        experts.after(results(run, 1.0), step, run.layout, schedule_of(run))
    assert len(gang.placements) == 1


def test_a_resumed_run_looks_when_the_first_one_would_have(tmp_path: Path) -> None:
    run = run_of(tmp_path, rebalance_every=100)
    run = replace(run, train=replace(run.train, steps=1000))
    gang = FakeGang()
    experts, events = moves(run, gang, tmp_path)
    for step in range(195, 200):
        experts.after(results(run, 3.0), step, run.layout, schedule_of(run))
    assert not notes_of(events)
    experts.after(results(run, 3.0), 200, run.layout, schedule_of(run))
    [note] = notes_of(events)
    assert note.startswith("experts after step 200: ")
    assert "in 100 steps" in note


def test_with_other_micro_batches_what_was_foreseen_is_forgotten(tmp_path: Path) -> None:
    run = run_of(tmp_path, rebalance_every=4)
    run = replace(run, train=replace(run.train, steps=100))
    experts, events = moves(run, FakeGang(), tmp_path)
    for step in (1, 2, 3):
        experts.after(results(run, 3.0), step, run.layout, schedule_of(run))
    other = make_schedule(run.layout.schedule, run.layout.pipeline, 8)
    experts.after(results(run, 1.0), 4, run.layout, other)
    assert not notes_of(events)  # one step is not enough
    experts.after(results(run, 1.0), 5, run.layout, other)
    [note] = notes_of(events)
    assert note.startswith("experts after step 5: stay, no layer would be faster")


def test_a_gain_lasts_no_longer_than_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, rebalance_every=3)
    experts, events = moves(run, FakeGang(), tmp_path)
    for step in (1, 2, 3):
        experts.after(results(run, 3.0), step, run.layout, schedule_of(run))
    [note] = notes_of(events)
    assert run.train.steps == 4
    assert "in 1 steps" in note


def test_what_is_to_know_about_nodes_is_said_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, rebalance_every=1)
    run = replace(
        run, model=replace(run.model, n_routed_experts=12, n_group=3), train=replace(
            run.train, steps=100)
    )  # fmt: skip
    experts, events = moves(run, FakeGang(), tmp_path, NodeMap.of([0, 1]))
    rows = dict.fromkeys(run.model.moe_layers, [100] * 6)
    for step in (1, 2, 3):
        each = [
            replace(result, work=replace(result.work, slot_rows=rows))
            for result in results(run, 1.0)
        ]
        experts.after(each, step, run.layout, schedule_of(run))
    notes = notes_of(events)
    assert len(notes) == 3
    assert ["n_group 3 is not divisible by 2 nodes" in note for note in notes] == [
        True, False, False
    ]  # fmt: skip


def test_without_a_period_nothing_is_looked_at(tmp_path: Path) -> None:
    run, gang = run_of(tmp_path, rebalance_every=0), FakeGang()
    experts, events = moves(run, gang, tmp_path)
    experts.after(results(run, 3.0), 1, run.layout, schedule_of(run))
    assert not gang.placements
    assert not events.read(0, 0.0)


def test_a_worker_that_is_lost_in_a_migration_leaves_the_old_placement(tmp_path: Path) -> None:
    run = run_of(tmp_path, rebalance_every=1)
    experts, _ = moves(run, FakeGang(lost=True), tmp_path)
    first = experts.placement
    with pytest.raises(WorkerLostError):
        experts.after(results(run, 3.0), 1, run.layout, schedule_of(run))
    assert experts.placement == first
    assert not read_metrics(tmp_path / "metrics.jsonl").migrations


def test_the_fullest_rank_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert imbalance(run.layout, results(run, 3.0)) == pytest.approx(800 / 600)


@pytest.mark.parametrize(("memory", "fits"), [(4e5, False), (1e12, True)])
def test_more_copies_than_memory_allows(tmp_path: Path, memory: float, fits: bool) -> None:
    run = run_of(tmp_path, redundant=4)
    infos = [
        WorkerInfo(rank=rank, pid=1, node="a", memory_bytes=memory, has_device=True)
        for rank in range(4)
    ]
    choice = choice_of(run.layout, run.phases()[0])
    if fits:
        refuse_too_many_copies(run, run.layout, choice, infos)
        return
    with pytest.raises(ConfigError, match=r"experts\.redundant.* GB of a worker beside .* GB"):
        refuse_too_many_copies(run, run.layout, choice, infos)
    # Without redundant experts nothing is said here.
    refuse_too_many_copies(run_of(tmp_path, redundant=0), run.layout, choice, infos)
