"""Curves over the steps: losses, bits per byte, learning rate, gradient norm, throughput."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from dualray.platform.metrics import CheckpointSaved, PhaseEntered, StepMetrics, Yardsticks
from dualray.platform.readable import count
from dualray.platform.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    canvas,
    smooth,
    step_axis,
    thin,
    to_svg,
)

_DEPTH_COLORS = (PURPLE, ORANGE, GREY)


Phases = Sequence[PhaseEntered]


def loss_figure(steps: Sequence[StepMetrics], phases: Phases = ()) -> str:
    """Training, multi-token-prediction and held-out loss in nats per token."""
    xs = [step.step for step in steps]
    with canvas(3.6) as figure:
        axes = figure.add_subplot()
        for depth in reversed(range(max(len(step.mtp_loss) for step in steps))):
            ys = [s.mtp_loss[depth] if depth < len(s.mtp_loss) else np.nan for s in steps]
            color = _DEPTH_COLORS[min(depth, len(_DEPTH_COLORS) - 1)]
            _noisy(axes, xs, ys, color, f"multi-token prediction, depth {depth + 1}")
        _noisy(axes, xs, [step.loss for step in steps], BLUE, "training")
        heldout = [(s.step, s.heldout_loss) for s in steps if s.heldout_loss is not None]
        if heldout:
            axes.plot(
                *zip(*heldout), "o-", color=GREEN, markersize=4, label="held-out", clip_on=False
            )
        axes.set_ylabel("nats per token")
        step_axis(axes, xs)
        _mark_phases(axes, phases, named=True)
        # Drawn last to lie on top, but named first.
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: labels[index].startswith("multi"))
        axes.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper right")
        return to_svg(figure, "loss", "Loss over the steps")


def bits_per_byte_figure(
    steps: Sequence[StepMetrics], yardsticks: Yardsticks | None, phases: Phases = ()
) -> str:
    """Held-out bits per byte against what compressors and n-gram models reach."""
    points = heldout_points(steps)
    with canvas(3.6) as figure:
        axes = figure.add_subplot()
        axes.plot(*zip(*points), "o-", color=GREEN, markersize=4)
        axes.plot(*points[-1], "o", color=GREEN, markersize=4, clip_on=False)
        best = min(value for _, value in points)
        axes.annotate(
            f"this model {points[-1][1]:.3f}",
            points[-1],
            xytext=(0, -14),
            textcoords="offset points",
            ha="right" if len(points) > 1 else "center",
            color=GREEN,
            fontweight="bold",
        )
        lines = {} if yardsticks is None else _lines(yardsticks)
        low = min([best, *lines.values()])
        # The first evaluations are far above everything; the interesting part is the rest.
        high = max([*lines.values(), min(max(value for _, value in points), 2.0 * low)])
        room = 0.10 * (high - low) or 0.1
        axes.set_ylim(low - 1.6 * room, high + room)
        step_axis(axes, [step.step for step in steps])
        _mark_phases(axes, phases)
        heights = _apart(list(lines.values()), 0.055 * (high - low + 2.6 * room))
        for (title, value), height in zip(lines.items(), heights):
            axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
            axes.annotate(
                f"{title} {value:.3f}",
                (1.0, height),
                xycoords=("axes fraction", "data"),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                annotation_clip=False,
            )
        axes.set_ylabel("bits per byte")
        return to_svg(figure, "bits", "Held-out bits per byte over the steps")


def heldout_points(steps: Sequence[StepMetrics]) -> list[tuple[int, float]]:
    """(step, bits per byte) of every evaluation whose result is finite."""
    evaluated = [(step.step, step.heldout_bits_per_byte) for step in steps]
    return [(at, value) for at, value in evaluated if value is not None and np.isfinite(value)]


def optimizer_figure(steps: Sequence[StepMetrics], phases: Phases = ()) -> str:
    """Learning rate and gradient norm."""
    xs = [step.step for step in steps]
    with canvas(2.7) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(*thin(xs, [step.lr for step in steps]), color=BLUE, marker=_marker(xs))
        left.set_title("learning rate")
        left.set_ylim(bottom=0)
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        _noisy(right, xs, [step.grad_norm for step in steps], ORANGE, "")
        right.set_title("gradient norm before clipping")
        _clip_spikes(right, [step.grad_norm for step in steps])
        for axes in (left, right):
            step_axis(axes, xs)
            _mark_phases(axes, phases)
        return to_svg(figure, "optimizer", "Learning rate and gradient norm over the steps")


def speed_figure(
    steps: Sequence[StepMetrics], checkpoints: Sequence[CheckpointSaved], phases: Phases = ()
) -> str:
    """Throughput and measured bubble; ticks at the bottom mark checkpoints."""
    xs = [step.step for step in steps]
    with canvas(2.7) as figure:
        left, right = figure.subplots(1, 2)
        _noisy(left, xs, [step.tokens_per_s for step in steps], BLUE, "")
        left.set_title("tokens per second")
        left.set_ylim(bottom=0)
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        _noisy(right, xs, [step.bubble for step in steps], PURPLE, "")
        right.set_title("pipeline bubble")
        right.set_ylim(0, max(0.1, 1.15 * max(step.bubble for step in steps)))
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes in (left, right):
            step_axis(axes, xs)
            _mark_phases(axes, phases)
        if checkpoints:
            marks = [saved.step for saved in checkpoints]
            transform = left.get_xaxis_transform()
            heights = [0.02] * len(marks)
            left.plot(marks, heights, "^", color=INK, transform=transform, clip_on=False)
        return to_svg(figure, "speed", "Throughput and pipeline bubble over the steps")


def _mark_phases(axes: Axes, phases: Phases, *, named: bool = False) -> None:
    """A line where a phase begins; its sequence length beside it if asked for."""
    for phase in phases:
        # Between the last step before it and its first.
        axes.axvline(phase.step - 0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
        if named:
            axes.annotate(
                f"{phase.seq_len} tokens",
                (phase.step - 0.5, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                color=MUTED,
            )


def _noisy(axes: Axes, xs: Sequence[int], ys: Sequence[float], color: str, label: str) -> None:
    """A curve as measured, pale, with its running mean on top."""
    if len(xs) < 30:
        axes.plot(xs, ys, color=color, label=label, marker=_marker(xs))
        return
    axes.plot(*thin(xs, ys), color=color, alpha=0.28, linewidth=1)
    window = max(3, len(xs) // 40)
    axes.plot(*thin(xs, smooth(ys, window)), color=color, label=label)


def _marker(xs: Sequence[int]) -> str:
    return "o" if len(xs) < 3 else ""


def _clip_spikes(axes: Axes, ys: Sequence[float]) -> None:
    """Keep a few spikes from flattening the rest."""
    finite = np.asarray([y for y in ys if np.isfinite(y)])
    if len(finite):
        top = min(finite.max(), 3.0 * np.quantile(finite, 0.97))
        axes.set_ylim(0, 1.1 * top or 1.0)


def _lines(yardsticks: Yardsticks) -> dict[str, float]:
    named = {
        "gzip -9": yardsticks.gzip,
        "bzip2 -9": yardsticks.bzip2,
        "unigram": yardsticks.unigram,
        "bigram": yardsticks.bigram,
    }
    return dict(sorted(named.items(), key=lambda item: item[1]))


def _apart(values: list[float], gap: float) -> list[float]:
    """Ascending label positions near ascending values, no two closer than `gap`."""
    placed: list[float] = []
    for value in values:
        placed.append(value if not placed else max(value, placed[-1] + gap))
    return placed
