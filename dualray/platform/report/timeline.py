"""The pipeline as it ran: one row per worker, one bar per action, from the measured trace."""

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
    ORANGE,
    ORANGE_DEEP,
    PAPER,
    PURPLE,
    WIDTH_IN,
    canvas,
    to_svg,
)
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
    "other": (GREY, "other computation"),
}

# A row is one unit high: computation above, communication as a strip below it.
_TOP, _MIDDLE, _STRIP, _BOTTOM = 0.40, -0.20, -0.25, -0.40
_CHARACTER_PX = 5.6
_FIGURE_PX = 72 * WIDTH_IN


def shown_spans(trace: Trace) -> tuple[Span, ...]:
    """The spans that are drawn: all, or the first MAX_SPANS by start time."""
    return trace.spans[:MAX_SPANS]


def timeline_figure(trace: Trace, layout: Layout | None) -> str:
    """The timeline as SVG."""
    spans = shown_spans(trace)
    origin = min(span.start_s for span in spans)
    length_s = max(span.end_s for span in spans) - origin
    unit, scale = ("ms", 1e3) if length_s < 10 else ("s", 1.0)
    ranks = trace.ranks
    rows = {rank: len(ranks) - 1 - index for index, rank in enumerate(ranks)}
    with canvas(1.1 + 0.48 * len(ranks)) as figure:
        axes = figure.add_subplot()
        boxes: dict[str, list[list[tuple[float, float]]]] = {}
        texts: list[tuple[float, float, str]] = []
        # Bars share the width with the row titles, which take about a seventh of it.
        px_per_unit = 0.84 * _FIGURE_PX / (length_s * scale or 1.0)
        for span in spans:
            left = (span.start_s - origin) * scale
            right = (span.end_s - origin) * scale
            for kind, low, high, text in _bars(span):
                y = rows[span.rank]
                corners = [(left, y + low), (right, y + low), (right, y + high), (left, y + high)]
                boxes.setdefault(kind, []).append(corners)
                fitting = _fitting(text, (right - left) * px_per_unit)
                if fitting:
                    texts.append(((left + right) / 2, y + (low + high) / 2, fitting))
        for kind, polygons in boxes.items():
            axes.add_collection(
                PolyCollection(
                    polygons, facecolors=_LEGEND[kind][0], edgecolors=PAPER, linewidths=0.4
                )
            )
        for x, y, text in texts:
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center_baseline",
                fontsize=7.5,
                color=PAPER,
                clip_on=True,
            )
        axes.set_xlim(0, length_s * scale or 1.0)
        axes.set_ylim(-0.55, len(ranks) - 0.45)
        axes.set_yticks(list(rows.values()), labels=[_title(rank, layout) for rank in rows])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        _legend(axes, boxes)
        return to_svg(figure, "timeline", "What every worker did when")


def _bars(span: Span) -> Iterator[tuple[str, float, float, str]]:
    """(legend key, lower edge, upper edge, text) of the bars that one span becomes."""
    if span.category == Category.COMMUNICATION:
        yield "communication", _BOTTOM, _STRIP, ""
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


def _title(rank: int, layout: Layout | None) -> str:
    if layout is None or rank >= layout.world_size:
        return f"worker {rank}"
    at = layout.coordinate(rank)
    parts = [f"pipeline {at.pipeline}"] if layout.pipeline > 1 else []
    parts += [f"expert {at.expert}"] if layout.experts > 1 else []
    parts += [f"replica {at.replica}"] if layout.replicas > 1 else []
    return f"worker {rank}" + (f" ({', '.join(parts)})" if parts else "")


def _legend(axes: Axes, kinds: dict[str, list[list[tuple[float, float]]]]) -> None:
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
