"""A decision for people: what was considered, what it would take, and why."""

from __future__ import annotations

from collections.abc import Iterator

from dualray.platform.readable import count
from dualray.platform.scheduler import Decision
from dualray.platform.scheduling.candidates import Forecast

_SHOWN = 6
_HEADER = ("schedule", "layers", "micro-batches", "step", "bubble", "memory")


def decision_lines(decision: Decision, step: int) -> list[str]:
    """A sentence, and a table of the fastest candidates with what was done until now."""
    shown = list(decision.ranked[:_SHOWN])
    if decision.before.choice not in [each.choice for each in shown]:
        shown.append(decision.before)
    rows = [_HEADER, *(_row(each) for each in shown)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    marks = ["", *(" ".join(_marks(each, decision)) for each in shown)]
    return [
        f"scheduler after step {step}: {decision.reason}",
        *(f"  {line}  {mark}".rstrip() for line, mark in zip(table, marks)),
    ]


def _row(each: Forecast) -> tuple[str, ...]:
    choice = each.choice
    return (
        choice.schedule,
        "+".join(map(str, choice.layers)),
        f"{choice.micro_batches} x {choice.micro_batch_size}",
        f"{each.step_s:.3f} s",
        f"{each.bubble:.1%}",
        f"{count(each.memory_bytes)}B",
    )


def _marks(each: Forecast, decision: Decision) -> Iterator[str]:
    if each.choice == decision.choice:
        yield "<- chosen"
    if each.choice == decision.before.choice:
        yield "(until now)"
    if not each.fits:
        yield "does not fit into memory"
