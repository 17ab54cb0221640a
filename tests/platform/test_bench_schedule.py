"""The schedule benchmark: a stand-in that takes the time it says, and results that are whole.

Most of it runs on a clock that nobody waits for, so durations are exact.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualray.errors import ConfigError
from dualray.parallel.p2p import PipelineLinks
from dualray.platform.bench import schedule as bench
from dualray.platform.bench.schedule_costs import measure_costs, plan
from dualray.platform.bench.schedule_ranks import LAYERS_PER_RANK, layers_of_stage
from dualray.platform.bench.sleeping_stage import Clock, LayerDurations
from dualray.platform.bench.sleeping_worker import SleepingWorker
from dualray.platform.cli import main
from dualray.platform.commands.bench import app
from dualray.platform.commands.bench_schedule import parse_ranks
from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step, flatten
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import simulate
from dualray.schedule.verify import verify

LAYER = LayerDurations(compute_s=4.0, journey_s=3.0)
TINY = bench.Workload(layer=LayerDurations(compute_s=1e-3, journey_s=0.5e-3), ranks=(2,), steps=2)


class FakeTime:
    """Sleeps take no time but their own, and those that sleep at all are noted."""

    def __init__(self, oversleeps_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self._oversleeps_s = oversleeps_s
        self.clock = Clock(read=lambda: self.now_s, sleep=self._sleep)

    def _sleep(self, duration_s: float) -> None:
        if duration_s > 0:
            self.slept.append(duration_s)
            self.now_s += duration_s + self._oversleeps_s


def walk(schedule: Schedule, num_layers: int = 1) -> tuple[FakeTime, SleepingWorker]:
    time = FakeTime()
    worker = SleepingWorker(schedule, 0, PipelineLinks({}, (0,)), LAYER, num_layers, time.clock)
    sums = worker.step()
    worker.close()
    assert sums.main == schedule.num_micro_batches  # each has passed through one stage
    return time, worker


def one_rank(*steps: Step) -> Schedule:
    """One stage on one rank that does these steps; needs them complete, as `verify` says."""
    found = Schedule(
        kind="test",
        num_ranks=1,
        num_stages=1,
        num_micro_batches=1 + max(action.micro_batch for action in flatten(steps)),
        steps=(steps,),
        stage_of=((0,),),
    )
    verify(found)
    return found


def a(name: str) -> Action:
    return Action(Kind(name[0]), 0, int(name[1:]))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_kind_of_step_takes_what_the_costs_say(num_layers: int) -> None:
    costs = LAYER.costs(num_layers)
    whole = [
        (make_schedule("1f1b", 1, 3), 3 * (costs.forward + costs.backward)),
        (make_schedule("zb1p", 1, 3), 3 * (costs.forward + costs.backward)),
        (
            one_rank(a("F0"), Overlap(a("F1"), a("B0")), Overlap(a("F2"), a("B1")), a("B2")),
            costs.forward + 2 * costs.overlapped + costs.backward,
        ),
    ]
    for schedule, expected in whole:
        time, _ = walk(schedule, num_layers)
        assert sum(time.slept) == pytest.approx(expected)
        assert time.now_s == pytest.approx(100 + expected)


def test_a_pair_hides_every_journey_and_a_step_by_itself_none() -> None:
    alone = walk(one_rank(a("F0"), a("B0")))[0].slept
    assert alone == pytest.approx([4, 3, 4, 3, 3, 4, 3, 4, 8])
    pair = walk(one_rank(a("F0"), Overlap(a("F1"), a("B0")), a("B1")))[0].slept
    # In turn: attention, experts' gradient, experts, attention's gradient; then W.
    assert pair[4:-5] == pytest.approx([4, 4, 4, 4, 8])


def test_a_weight_gradient_waits_for_its_w() -> None:
    steps = [a(name) for name in ("F0", "F1", "I0", "I1", "W0", "W1")]
    slept = walk(one_rank(*steps))[0].slept
    assert slept == pytest.approx([4, 3, 4, 3] * 2 + [3, 4, 3, 4] * 2 + [8, 8])


def test_every_weight_gradient_is_counted_once() -> None:
    for schedule in (make_schedule("zb1p", 1, 5), plan(2)):
        _, worker = walk(schedule)
        counted = worker.held.stages[0].weight.main_grad
        assert counted.tolist() == [schedule.num_micro_batches] * worker.held.hidden_size


def test_what_is_overslept_comes_off_the_next_sleep() -> None:
    time = FakeTime(oversleeps_s=0.25)
    time.clock.begin()
    for _ in range(3):
        time.clock.work(1.0)
    assert time.slept == [1.0, 0.75, 0.75]
    time.clock.until(time.now_s - 5.0)
    assert len(time.slept) == 3  # it is that late already
    time.clock.begin()
    time.clock.work(1.0)
    assert time.slept[3:] == [1.0]


def test_the_plan_for_costs_can_be_executed_and_has_everything() -> None:
    for repeats in (1, 4):
        schedule = plan(repeats)
        verify(schedule)
        kinds = [str(step)[0] if isinstance(step, Action) else "&" for step in schedule.steps[0]]
        assert [kinds.count(kind) for kind in "&IW"] == [repeats] * 3
        assert kinds.count("B") == repeats + 1


def test_costs_are_at_least_what_is_slept() -> None:
    layer = TINY.layer
    nominal = layer.costs(2)
    found = measure_costs(layer, 2, Clock())
    # No sleep ends early; spans are noted in seconds of the epoch, to 0.3 us.
    for field in ("forward", "input_grad", "weight_grad", "overlapped", "backward"):
        measured = found.backward_s if field == "backward" else getattr(found.costs, field)
        assert measured > getattr(nominal, field) - 2e-6, field


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_all_schedules_cut_the_same_model_and_lie_in_the_published_order(num_ranks: int) -> None:
    bubbles = {}
    for kind in KINDS:
        schedule = make_schedule(kind, num_ranks, bench.num_micro_batches(num_ranks))
        num_layers = layers_of_stage(schedule)
        assert schedule.num_stages * num_layers == num_ranks * LAYERS_PER_RANK
        bubbles[kind] = simulate(schedule, bench.FULL.layer.costs(num_layers)).bubble
    assert bench.order_holds(bubbles)
    for kind, other in (("zb1p", "dualpipe"), ("dualpipev", "1f1b"), ("gpipe", "zb1p")):
        assert not bench.order_holds({**bubbles, kind: bubbles[other]})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A record of two ranks with steps of some milliseconds, and what was printed."""
    path = tmp_path_factory.mktemp("records") / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUICK", TINY)
        done = CliRunner().invoke(
            app, ["schedule", "--quick", "--record", str(path)], env={"COLUMNS": "120"}
        )
    assert done.exit_code == 0, done.exception
    return path, done.stdout


@pytest.mark.multiproc
def test_a_record_is_whole(recorded: tuple[Path, str]) -> None:
    record = json.loads(recorded[0].read_text())
    assert record["benchmark"] == "schedule"
    assert record["config"]["layer"] == {"compute_s": 1e-3, "journey_s": 0.5e-3}
    (result,) = record["results"]
    assert (result["ranks"], result["micro_batches"]) == (2, 8)
    assert result["exchange_s"] > 0
    assert [stage["layers"] for stage in result["stages"]] == [1, 2]
    assert {row["schedule"] for row in result["schedules"]} == set(KINDS)
    assert result["worst_ratio"] in [row["ratio"] for row in result["schedules"]]
    for row in result["schedules"]:
        schedule = make_schedule(row["schedule"], 2, 8)
        nominal = TINY.layer.costs(row["layers_of_stage"])
        # Each rank sleeps at least its own steps, whatever it waits for in between.
        timeline = simulate(schedule, nominal)
        floor_s = timeline.makespan - min(timeline.idle)
        assert len(row["steps_s"]) == 2
        assert min(row["steps_s"]) >= floor_s
        assert row["ratio"] == row["measured_s"] / row["simulated_s"]
        assert 0 <= row["measured_bubble"] < 1
        assert row["peak_activations"] == max(verify(schedule).activations)


@pytest.mark.multiproc
def test_a_table_has_a_row_for_every_schedule(recorded: tuple[Path, str]) -> None:
    path, printed = recorded
    first, head, *rows, summary, legend, appended = printed.splitlines()
    assert first.startswith("schedule, 2 steps each, ")
    assert head.split()[:5] == ["ranks", "schedule", "simulated", "measured", "ratio"]
    assert [row.split()[:2] for row in rows] == [["2", kind] for kind in KINDS]
    assert summary.startswith(
        "2 ranks, 8 micro-batches: costs of a stage in ms, measured (slept): "
    )
    assert " (6), I " in summary
    assert legend.startswith("simulated with the costs measured by themselves; ")
    assert appended == f"appended to {path}"


def test_ranks_are_even_numbers() -> None:
    assert parse_ranks("4,8") == (4, 8)
    assert parse_ranks("2, 16") == (2, 16)
    for text in ("3", "0", "18", "four", "4,", "", "4;8", "-2"):
        with pytest.raises(ConfigError) as refused:
            parse_ranks(text)
        assert str(refused.value) == (
            f"--ranks is {text} and must be even numbers from 2 to 16, separated by commas "
            "(dualpipe needs them even); try --ranks 4,8."
        )


def test_a_mistake_is_refused_before_anything_starts(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["dualray", "bench", "schedule", "--ranks", "5"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("error: --ranks is 5 and must be even numbers from 2 to 16, ")
    assert said.err.count("\n") == 1
