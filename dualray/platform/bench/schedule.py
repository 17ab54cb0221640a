"""Measured steps of all five schedules beside their simulation.

Real processes walk the real schedules with stages that sleep (`sleeping_stage`), and the simulation
is told what a step of each kind takes by itself (`schedule_costs`). All schedules cut the same
model into stages and have the same micro-batches. DualPipe and DualPipeV run their pairs
overlapped, which hides what the others leave exposed: that is most of their gain.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dualray.platform.bench.hosts import LOOPBACK
from dualray.platform.bench.ranks import run_ranks
from dualray.platform.bench.schedule_costs import Measured
from dualray.platform.bench.schedule_ranks import Found, Task, Walk, layers_of_stage, run
from dualray.platform.bench.sleeping_stage import LayerDurations
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import Costs, simulate

SAME = 0.05
"""How far the bubbles of gpipe and 1f1b may lie apart, which the theory has equal; a share."""
_WARM_UP_STEPS = 1
_TIMEOUT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is slept, and how often."""

    layer: LayerDurations
    ranks: tuple[int, ...]
    """Pipeline ranks P of each comparison, unless others are asked for."""
    steps: int
    """Measured steps of each schedule, behind what warms up."""


FULL = Workload(layer=LayerDurations(compute_s=10e-3, journey_s=7.5e-3), ranks=(4, 8), steps=5)
"""F = I = 70 ms, W = 40 ms and F&B = 120 ms a stage: long enough for the executor's own work
to be 1 % of a step with 8 ranks on two cores. Some 4 minutes."""

QUICK = Workload(layer=LayerDurations(compute_s=4e-3, journey_s=3e-3), ranks=(4,), steps=2)
"""Half a minute: shows that everything works; short steps that other work disturbs more."""


def num_micro_batches(num_ranks: int) -> int:
    """20 for 8 ranks, as in arXiv 2412.19437, figure 5; every schedule exists for it."""
    return 2 * num_ranks + 4


def compare(
    workload: Workload, ranks: Sequence[int], *, on_part: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """One comparison of all schedules for each number of ranks, as plain data."""
    results = []
    for num_ranks in ranks:
        task = Task(
            num_micro_batches=num_micro_batches(num_ranks),
            layer=workload.layer,
            warm_up_steps=_WARM_UP_STEPS,
            steps=workload.steps,
        )
        num_steps = task.warm_up_steps + task.steps
        on_part(f"{num_ranks} ranks: all schedules in turn, {num_steps} steps each")
        load = os.getloadavg()[0]
        found = run_ranks(run, task, [LOOPBACK] * num_ranks, timeout_s=_TIMEOUT_S)
        results.append({"load_average": load, **result(task, found)})
    return results


def result(task: Task, found: Sequence[Found]) -> dict[str, Any]:
    """From what the ranks have measured, one `Found` each."""
    costs, exchange_s = found[0].costs, found[0].exchange_s
    rows = [
        _row(kind, task, [rank.walks[kind] for rank in found], costs, exchange_s) for kind in KINDS
    ]
    return {
        "ranks": len(found),
        "micro_batches": task.num_micro_batches,
        "exchange_s": exchange_s,
        "stages": [
            {
                "layers": num_layers,
                "nominal": _with_backward(task.layer.costs(num_layers)),
                "measured": {**asdict(measured.costs), "backward": measured.backward_s},
            }
            for num_layers, measured in costs.items()
        ],
        "schedules": rows,
        "worst_ratio": max((row["ratio"] for row in rows), key=lambda ratio: abs(ratio - 1)),
        "order_holds": order_holds({row["schedule"]: row["measured_bubble"] for row in rows}),
    }


def _row(
    kind: str,
    task: Task,
    walks: Sequence[Sequence[Walk]],
    costs: Mapping[int, Measured],
    exchange_s: float,
) -> dict[str, Any]:
    num_ranks = len(walks)
    schedule = make_schedule(kind, num_ranks, task.num_micro_batches)
    num_layers = layers_of_stage(schedule)
    timeline = simulate(schedule, costs[num_layers].costs, exchange=exchange_s)
    steps_s, bubbles = [], []
    for step in zip(*walks):
        passed = sum(walk.loss for walk in step)
        assert passed == schedule.num_stages * task.num_micro_batches, (kind, passed)
        steps_s.append(max(walk.elapsed_s for walk in step))
        bubbles.append(1 - sum(walk.busy_s for walk in step) / (num_ranks * steps_s[-1]))
    measured_s = statistics.median(steps_s)
    return {
        "schedule": kind,
        "layers_of_stage": num_layers,
        "simulated_s": timeline.makespan,
        "measured_s": measured_s,
        "ratio": measured_s / timeline.makespan,
        "steps_s": steps_s,
        "simulated_bubble": timeline.bubble,
        "measured_bubble": statistics.median(bubbles),
        "peak_activations": max(timeline.peaks.activations),
    }


def _with_backward(costs: Costs) -> dict[str, float]:
    return {**asdict(costs), "backward": costs.backward}


def order_holds(bubbles: Mapping[str, float]) -> bool:
    """Whether the idle shares lie as published: gpipe = 1f1b > zb1p > dualpipe and dualpipev."""
    gpipe, one_f_one_b = bubbles["gpipe"], bubbles["1f1b"]
    return (
        abs(gpipe - one_f_one_b) <= SAME * one_f_one_b
        and min(gpipe, one_f_one_b) > bubbles["zb1p"]
        and bubbles["zb1p"] > max(bubbles["dualpipe"], bubbles["dualpipev"])
    )


def config_dict(workload: Workload) -> dict[str, Any]:
    """The workload as a record stores it."""
    return {
        "layer": asdict(workload.layer),
        "warm_up_steps": _WARM_UP_STEPS,
        "steps": workload.steps,
    }
