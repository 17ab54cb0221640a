"""From what a person asks for to a schedule, or to one sentence about what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from dualray.errors import ConfigError
from dualray.schedule.actions import Schedule
from dualray.schedule.baselines import gpipe, one_f_one_b, zb1p
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.dualpipev import dualpipev

KINDS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipev": dualpipev,
    "dualpipe": dualpipe,
}
"""Every schedule by the name that run files use."""

_TWO_WAY = ("dualpipev", "dualpipe")
"""Those whose ranks work for two directions at once."""


def make_schedule(kind: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The schedule `kind` for this many pipeline ranks and micro-batches of one step.

    Raises ConfigError in the run file's words (`layout.schedule`, `layout.pipeline`,
    `train.micro_batches`) when the schedule does not exist for these numbers.
    """
    if kind not in KINDS:
        close = difflib.get_close_matches(kind.lower(), KINDS, n=1)
        raise ConfigError(
            f"layout.schedule is {kind} and must be one of {', '.join(KINDS)}",
            hint=f"did you mean {close[0]}? set layout.schedule to {close[0]}"
            if close
            else "choose 1f1b, which runs with any numbers",
        )
    _at_least_one("layout.pipeline", num_ranks)
    _at_least_one("train.micro_batches", num_micro_batches)
    if kind in _TWO_WAY:
        _check_two_way(kind, num_ranks, num_micro_batches)
    return KINDS[kind](num_ranks, num_micro_batches)


def _at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{field} is {value} and must be at least 1", hint=f"set {field} to 1")


def _check_two_way(kind: str, num_ranks: int, num_micro_batches: int) -> None:
    if kind == "dualpipe" and num_ranks == 1:
        raise ConfigError(
            "layout.pipeline is 1 and dualpipe needs two ends to feed",
            hint="set layout.schedule to dualpipev or 1f1b, or layout.pipeline to 2",
        )
    if kind == "dualpipe" and num_ranks % 2:
        raise ConfigError(
            f"layout.pipeline is {num_ranks} and must be even with dualpipe",
            hint=f"set layout.pipeline to {num_ranks - 1} or {num_ranks + 1}, "
            "or layout.schedule to 1f1b",
        )
    if num_micro_batches < 2 * num_ranks:
        raise ConfigError(
            f"train.micro_batches is {num_micro_batches} and {kind} needs at least "
            f"2 x layout.pipeline = {2 * num_ranks}",
            hint=f"set train.micro_batches to {2 * num_ranks}, or layout.schedule to 1f1b",
        )
    if kind == "dualpipe" and num_micro_batches % 2:
        raise ConfigError(
            f"train.micro_batches is {num_micro_batches} and must be even with dualpipe, "
            "which splits them between two directions",
            hint=f"set train.micro_batches to {num_micro_batches + 1}",
        )
