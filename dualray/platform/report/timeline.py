"""The pipeline as it ran: one row per worker, one bar per action, from the measured trace.

Below it, along the same axis, the same schedule as the simulator sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from dualray.parallel.layout import Layout
from dualray.platform.report.style import (
    BLUE,
    BLUE_DEEP,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    ORANGE_DEEP,
    PAPER,
    PURPLE,
    WIDTH_IN,
    canvas,
    to_svg,
)
from dualray.platform.timeline import worker_title
from dualray.platform.trace import Category, Span, Trace

MAX_SPANS = 3000

_ACTION = re.compile(r"^([FBI])(\d)\.(\d+)$")
_LEGEND = {
    "F0": (BLUE, "forward, direction 0"),
    "B0": (BLUE_DEEP, "backward, direction 0"),
    "F1": (ORANGE, "forward, direction 1"),
    "B1": (ORANGE_DEEP, "backward, direction 1"),
    "W": (GREEN, "weight gradient"),
    "optimizer": (PURPLE, "optimizer"),
    "communication": (GREY, "communication"),
    "waiting": (GRID, "waiting for the pipeline"),
    "other": (GREY, "other computation"),
}

# A row is one unit high: computation above, communication as a strip below it.
_TOP, _MIDDLE, _STRIP, _BOTTOM = 0.40, -0.20, -0.25, -0.40
_GAP = 0.5
_CHARACTER_PX = 5.6
_FIGURE_PX = 72 * WIDTH_IN

_Boxes = dict[str, list[list[tuple[float, float]]]]
"""By legend key, the corners of every bar."""


def step_spans(trace: Trace) -> list[Span]:
    """What belongs to the step itself, by start time: a checkpoint may come long after it."""
    return [span for span in trace.spans if span.category != Category.CHECKPOINT]


def timeline_figure(trace: Trace, layout: Layout | None) -> str:
    """The timeline as SVG: what was measured, and below it what was simulated, if anything.

    Only the first MAX_SPANS of `step_spans` are drawn.
    """
    measured = step_spans(trace)[:MAX_SPANS]
    origin = min(span.start_s for span in measured)
    end = max(span.end_s for span in measured)
    simulated = [span for span in trace.simulated if span.start_s < end]
    length_s = max(span.end_s for span in (*measured, *simulated)) - origin
    unit, scale = ("ms", 1e3) if length_s < 10 else ("s", 1.0)
    # Rows go down from 0; a gap sets the simulation apart.
    ranks = sorted({span.rank for span in measured})
    heights = {rank: float(-row) for row, rank in enumerate(ranks)}
    titles = {heights[rank]: worker_title(rank, layout) for rank in ranks}
    first = -len(ranks) - _GAP
    simulated_ranks = sorted({span.rank for span in simulated})
    simulated_heights = {rank: first - row for row, rank in enumerate(simulated_ranks)}
    titles |= {y: f"simulated (pipeline {rank})" for rank, y in simulated_heights.items()}
    with canvas(1.1 + 0.48 * -min(titles) + 0.48) as figure:
        axes = figure.add_subplot()
        # Bars share the width with the row titles, which take about a seventh of it.
        px_per_unit = 0.84 * _FIGURE_PX / (length_s * scale or 1.0)
        boxes: _Boxes = {}
        for spans, row_of in ((measured, heights), (simulated, simulated_heights)):
            for span in spans:
                left, right = (span.start_s - origin) * scale, (span.end_s - origin) * scale
                for kind, low, high, text in _bars(span):
                    y = row_of[span.rank]
                    low, high = y + low, y + high
                    corners = [(left, low), (right, low), (right, high), (left, high)]
                    boxes.setdefault(kind, []).append(corners)
                    fitting = _fitting(text, (right - left) * px_per_unit)
                    if fitting:
                        _write(axes, (left + right) / 2, (low + high) / 2, fitting)
        # Waits first: those within an action, for expert ranks, vanish beneath it.
        for kind in sorted(boxes, key=lambda kind: kind != "waiting"):
            color = _LEGEND[kind][0]
            axes.add_collection(
                PolyCollection(boxes[kind], facecolors=color, edgecolors=PAPER, linewidths=0.4)
            )
        axes.set_xlim(0, length_s * scale or 1.0)
        axes.set_ylim(min(titles) - 0.55, 0.45)
        axes.set_yticks(list(titles), labels=list(titles.values()))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        _legend(axes, boxes)
        return to_svg(figure, "timeline", "What every worker did when")


def _write(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(
        x, y, text, ha="center", va="center_baseline", fontsize=7.5, color=PAPER, clip_on=True
    )


def _bars(span: Span) -> Iterator[tuple[str, float, float, str]]:
    """(legend key, lower edge, upper edge, text) of the bars that one span becomes."""
    if span.category == Category.COMMUNICATION:
        yield "communication", _BOTTOM, _STRIP, ""
        return
    if span.category == Category.WAITING:
        yield "waiting", _MIDDLE, _TOP, ""
        return
    if span.category == Category.OPTIMIZER:
        yield "optimizer", _MIDDLE, _TOP, ""
        return
    parts = span.name.split("&")
    height = (_TOP - _MIDDLE) / len(parts)
    for index, part in enumerate(parts):
        top = _TOP - index * height
        yield _kind(part), top - height, top, part


def _kind(text: str) -> str:
    if text == "W":
        return "W"
    match = _ACTION.match(text)
    if match is None:
        return "other"
    key = ("F" if match[1] == "F" else "B") + match[2]
    return key if key in _LEGEND else "other"


def _fitting(text: str, width_px: float) -> str:
    """The longest form of an action's text that fits: `F0.3`, `3`, or nothing."""
    if not text or text == "W":
        return text if width_px > 2 * _CHARACTER_PX else ""
    for form in (text, text.rpartition(".")[2]):
        if len(form) * _CHARACTER_PX + 2 <= width_px:
            return form
    return ""


def _legend(axes: Axes, kinds: _Boxes) -> None:
    handles = [Patch(color=c, label=label) for key, (c, label) in _LEGEND.items() if key in kinds]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=4,
        fontsize=9,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
        borderaxespad=0.3,
    )
