"""The rebalancing benchmark from beginning to end, as rows of plain data, and what they say.

A layer waits for its slowest rank. So the slowest worker's time is summed layer by layer, whoever
it is in each; so is the time that would be if rows were spread by the measured speeds (`even`).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dualray.parallel.balancer import TRAINING_PASSES
from dualray.platform.bench.hosts import LOOPBACK
from dualray.platform.bench.ranks import run_ranks
from dualray.platform.bench.rebalance import EXPERT_RANKS, SLOW_RANK, RebalanceCase
from dualray.platform.bench.rebalance_ranks import (
    MOVES,
    STAYS,
    UNEQUAL,
    Step,
    Training,
    measure_rank,
)

SKEWED, BALANCED = 1.8, 1.1
"""Rows of the fullest rank over the mean: at least before, at most behind a migration."""
LOSS_TOLERANCE = 1e-6
"""Relative, in the step behind a migration: sums of fp32 in another order."""

WORDS = {
    "stays": "no copies, experts stay",
    "copies": "copies, not yet moved",
    "moved": "copies, moved",
    "slow": f"rank {SLOW_RANK} slow, placed by rows",
    "slow_moved": f"rank {SLOW_RANK} slow, placed by speed",
}
"""What tables call the settings."""
_WARM_UP_STEPS = 1
"""Of every half of a training; their rows and losses count, their times don't."""

Row = dict[str, Any]
Everybody = list[Step]
"""One step on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Rebalanced:
    """What the benchmark found, JSON throughout."""

    rows: list[Row]
    """One a setting."""
    migrations: list[Row]
    """Of equal ranks, and of the slow one."""
    load_average: float
    """Of the machine, before the benchmark put load on it."""


def compare_rebalance(
    case: RebalanceCase,
    *,
    timeout_s: float = 1800.0,
    on_part: Callable[[str], None] = lambda text: None,
) -> Rebalanced:
    """Train in processes on this machine. Raises what `run_ranks` raises."""
    load = os.getloadavg()[0]
    on_part(f"{3 * case.rounds} trainings of {case.steps} steps in {EXPERT_RANKS} processes")
    ranks: list[list[dict[str, Training]]] = run_ranks(
        measure_rank, case, [LOOPBACK] * EXPERT_RANKS, timeout_s=timeout_s
    )
    # By training and round, what each rank did.
    by_name = {
        name: [[rank[number][name] for rank in ranks] for number in range(case.rounds)]
        for name in (STAYS, MOVES, UNEQUAL)
    }
    first, second = slice(0, case.steps_per_look), slice(case.steps_per_look, None)
    halves = {
        "stays": (STAYS, second),
        "copies": (MOVES, first),
        "moved": (MOVES, second),
        "slow": (UNEQUAL, first),
        "slow_moved": (UNEQUAL, second),
    }
    rows = [
        row_of(setting, [_steps(each)[half] for each in by_name[name]])
        for setting, (name, half) in halves.items()
    ]
    migrations = [
        migration_of(case, after, by_name[name], by_name[STAYS])
        for name, after in ((MOVES, "moved"), (UNEQUAL, "slow_moved"))
    ]
    return Rebalanced(rows=rows, migrations=migrations, load_average=load)


def _steps(trainings: Iterable[Training]) -> list[Everybody]:
    return [list(each) for each in zip(*(training.steps for training in trainings), strict=True)]


def row_of(setting: str, rounds: list[list[Everybody]]) -> Row:
    """One setting's figures, over all rounds: means of rows, medians of times."""
    steps = [step for each in rounds for step in each]
    timed = [step for each in rounds for step in each[_WARM_UP_STEPS:]]
    layers = sorted(steps[0][0].rows)
    (rows,) = {sum(rank.rows[layer] for rank in step) for step in steps for layer in layers}
    imbalance = {
        layer: statistics.mean(
            max(rank.rows[layer] for rank in step) * len(step) / rows for step in steps
        )
        for layer in layers
    }
    slowest_s = statistics.median(
        sum(max(rank.computed_s[layer] for rank in step) for layer in layers) for step in timed
    )
    even_s = statistics.median(sum(_even_s(step, layer) for layer in layers) for step in timed)
    return {
        "setting": setting,
        "rows": rows,
        "imbalance": max(imbalance.values()),
        "imbalance_by_layer": list(imbalance.values()),
        "share_of_slow_rank": statistics.mean(
            step[SLOW_RANK].rows[layer] / rows for step in steps for layer in layers
        ),
        "slowest_s": slowest_s,
        "mean_s": statistics.median(
            statistics.mean(sum(rank.computed_s.values()) for rank in step) for step in timed
        ),
        "even_s": even_s,
        "slowest_per_even": slowest_s / even_s,
        "slowest_wall_s": statistics.median(
            sum(max(rank.wall_s[layer] for rank in step) for layer in layers) for step in timed
        ),
        "step_s": statistics.median(max(rank.step_s for rank in step) for step in timed),
        "timed_steps": len(timed),
    }


def _even_s(step: Everybody, layer: int) -> float:
    """Seconds if all ranks ended together, at the speeds that they had in this step."""
    speeds = [rank.rows[layer] / rank.computed_s[layer] for rank in step if rank.rows[layer]]
    return sum(rank.rows[layer] for rank in step) / sum(speeds)


def migration_of(
    case: RebalanceCase, after: str, moves: list[list[Training]], stays: list[list[Training]]
) -> Row:
    """What the balancer foresaw and what came, over rounds; by round the trainings of all ranks.

    `after` is the setting that the migration made.
    """
    looks = [trainings[0].migration for trainings in moves]
    migrations = [look for look in looks if look is not None]
    adopted = [look for look in migrations if look.moved]
    proposals = [look.proposal for look in migrations]
    differences = [
        _differences(own[0].steps, other[0].steps) for own, other in zip(moves, stays, strict=True)
    ]
    return {
        "setting": after,
        "adopted": len(adopted),
        "looks": len(migrations),
        "reasons": [proposal.reason for proposal in proposals],
        "steps_until_next_look": case.steps_per_look,
        "moves": _median(len(proposal.moves) for proposal in proposals),
        "foreseen_gain_s": _median(proposal.gain_s for proposal in proposals),
        "measured_gain_s": _median(map(_gain_s, moves)),
        "foreseen_cost_s": _median(proposal.cost_s for proposal in proposals),
        "seconds": _median(max(each.seconds for each in look.moved) for look in adopted),
        "bytes": _median(sum(each.received_bytes for each in look.moved) for look in adopted),
        "loss_difference_before": max(max(each[: case.steps_per_look]) for each in differences),
        "loss_difference_next_step": max(each[case.steps_per_look] for each in differences),
        "loss_difference_later": max(max(each[case.steps_per_look :]) for each in differences),
        "second_looks": [
            trainings[0].second_look.reason
            for trainings in moves
            if trainings[0].second_look is not None
        ],
    }


def _gain_s(trainings: list[Training]) -> float:
    """Seconds a step in all passes, of which the forwards were timed."""
    steps = _steps(trainings)
    half = len(steps) // 2
    before, after = (row_of("", [part])["slowest_s"] for part in (steps[:half], steps[half:]))
    return TRAINING_PASSES * (before - after)


def _differences(own: list[Step], other: list[Step]) -> list[float]:
    """Of the losses, step by step, relative to the twin's."""
    return [abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(own, other, strict=True)]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def goals(found: Rebalanced) -> list[Row]:
    """What was to be shown, whether it was, and a sentence with the figures."""
    rows = {row["setting"]: row for row in found.rows}
    stays, moved, slow, slow_moved = (
        rows[name] for name in ("stays", "moved", "slow", "slow_moved")
    )
    balanced = stays["imbalance"] >= SKEWED and moved["imbalance"] <= BALANCED
    difference = max(each["loss_difference_next_step"] for each in found.migrations)
    everything_moved = all(each["adopted"] == each["looks"] for each in found.migrations)
    return [
        {
            "goal": "balance",
            "met": balanced,
            "said": f"rows of the fullest rank over the mean, in the worst layer: from "
            f"{stays['imbalance']:.2f} to {moved['imbalance']:.2f} (goal: from {SKEWED} or more "
            f"to {BALANCED} or less)",
        },
        {
            "goal": "slowest_worker",
            "met": moved["slowest_s"] < stays["slowest_s"],
            "said": f"the slowest worker's experts compute {_ms(moved['slowest_s'])} a step "
            f"instead of {_ms(stays['slowest_s'])}, {moved['slowest_per_even']:.2f} times what "
            "it would be if all ended together (goal: less than before)",
        },
        {
            "goal": "loss",
            "met": everything_moved and difference <= LOSS_TOLERANCE,
            "said": f"the loss in the step behind a migration differs from the unmoved twin's by "
            f"{difference:.1e} relative at most (goal: {LOSS_TOLERANCE:g}), and in the steps "
            f"that follow by {max(each['loss_difference_later'] for each in found.migrations):.1e}",
        },
        {
            "goal": "unequal_ranks",
            "met": slow_moved["slowest_per_even"] <= BALANCED < slow["slowest_per_even"],
            "said": f"rank {SLOW_RANK} is slow and gets {slow_moved['share_of_slow_rank']:.0%} of "
            f"the rows instead of {slow['share_of_slow_rank']:.0%}, and the slowest worker takes "
            f"{_ms(slow_moved['slowest_s'])} a step instead of {_ms(slow['slowest_s'])}: "
            f"{slow_moved['slowest_per_even']:.2f} times what it would be if all ended together, "
            f"and {slow['slowest_per_even']:.2f} before (goal: {BALANCED} or less)",
        },
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
