"""How evenly expert ranks work, and when experts moved to make it even."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualray.platform.metrics import ExpertsMoved, StepMetrics
from dualray.platform.readable import number
from dualray.platform.report.html import figure, table
from dualray.platform.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    canvas,
    smooth,
    step_axis,
    thin,
    to_svg,
)

_SHOWN = 8


def evenness(steps: Sequence[StepMetrics], migrations: Sequence[ExpertsMoved]) -> str:
    """Figure and table; empty on a single expert rank."""
    if not any(step.rank_imbalance is not None for step in steps):
        return ""
    caption = (
        "Above, rows of the fullest expert rank over the mean, in the worst layer. Below, the "
        "seconds that workers computed in forwards of their routed experts: the slowest one makes "
        "the others wait."
    )
    if migrations:
        caption += " Dotted lines mark where experts moved to other ranks."
    return figure(evenness_figure(steps, migrations), caption) + _moves(migrations)


def evenness_figure(steps: Sequence[StepMetrics], migrations: Sequence[ExpertsMoved]) -> str:
    """Rows of the fullest rank and seconds of the slowest worker over the steps."""
    xs = [step.step for step in steps]
    window = max(1, len(xs) // 40)
    marker = "o" if len(xs) < 3 else ""
    with canvas(3.6) as drawn:
        above, below = drawn.subplots(2, 1, sharex=True)
        above.plot(
            *thin(xs, smooth([_known(s.rank_imbalance) for s in steps], window)),
            color=BLUE,
            marker=marker,
        )
        above.axhline(1.0, color=GREEN, linewidth=1.2, linestyle=(0, (5, 4)), label="balance")
        above.set_ylabel("fullest / mean")
        above.legend(loc="upper right")
        for values, label, color in (
            ([_known(s.expert_s) for s in steps], "slowest worker", ORANGE),
            ([_known(s.expert_s_mean) for s in steps], "mean", GREY),
        ):
            below.plot(*thin(xs, smooth(values, window)), color=color, label=label, marker=marker)
        below.set_ylabel("seconds")
        below.set_ylim(bottom=0.0)
        below.legend(loc="upper right", ncols=2)
        for axes in (above, below):
            for moved in migrations:
                axes.axvline(moved.step + 0.5, color=GREY, linewidth=1, linestyle=":")
        step_axis(below, xs)
        return to_svg(drawn, "evenness", "Rows and seconds of expert ranks over the steps")


def _known(value: float | None) -> float:
    return np.nan if value is None else value


def _moves(migrations: Sequence[ExpertsMoved]) -> str:
    if not migrations:
        return ""
    head = ("after step", "layers", "slowest rank / mean", "foreseen", "MB", "seconds", "why")
    rows = (
        (
            f"{moved.step:,}",
            str(len(moved.layers)),
            number(moved.imbalance_before, 2),
            number(moved.imbalance_after, 2),
            number(moved.num_bytes / 1e6, 1),
            number(moved.seconds, 2),
            moved.reason,
        )
        for moved in migrations[-_SHOWN:]
    )
    more = f"<p>The last {_SHOWN} of {len(migrations)} times that experts moved:</p>"
    return (more if len(migrations) > _SHOWN else "") + table(head, rows)
