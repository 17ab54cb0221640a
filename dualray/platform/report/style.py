"""How the report's figures look, and how they become SVG inside the page.

matplotlib draws with stand-in colours; in the SVG each is replaced by a CSS variable of the
page, so that one set of figures serves the light and the dark palette. Text stays text, in
the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH_IN = 10.0
"""Width of every figure; the page scales it to the column."""

# Stand-in colour -> CSS variable. The stand-ins are close to the light palette, so a figure
# is readable even where the page's style sheet is not applied.
INK = "#1c2126"
MUTED = "#656d76"
GRID = "#d8dde2"
PAPER = "#fdfefe"
BLUE = "#2a6fdb"
ORANGE = "#d9712b"
GREEN = "#2e8f6b"
PURPLE = "#8257c5"
RED = "#c8434f"
BLUE_DEEP = "#1d4e9c"
ORANGE_DEEP = "#9c4d17"
GREY = "#a3abb3"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--card",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
    RED: "--red",
    BLUE_DEEP: "--blue-deep",
    ORANGE_DEEP: "--orange-deep",
    GREY: "--grey",
}

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}


@contextmanager
def canvas(height_in: float) -> Generator[Figure]:
    """A figure of the report; draw on it inside the block, then pass it to `to_svg`."""
    # The axes read the settings when they are made and again when they are drawn.
    with mpl.rc_context(_SETTINGS):
        yield Figure(figsize=(WIDTH_IN, height_in), layout="constrained")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element. `name` keeps ids apart between figures on a page."""
    out = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        # A page is worth more than a perfect margin in a crowded figure.
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    # The page's font applies, not matplotlib's list of fallbacks, which before version 3.11 it
    # wrote as part of the shorthand `font`.
    text = re.sub(
        r"font: (?:(\d+) )?([\d.]+px) [^;\"]*",
        lambda match: f"font-weight: {match[1] or 400}; font-size: {match[2]}",
        text,
    )
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return re.sub(r"\n\s*", "\n", text)


def step_locator() -> MaxNLocator:
    """Ticks at round, whole steps."""
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Steps along x at whole numbers; a lone step stands in the middle."""
    first, last = steps[0], steps[-1]
    axes.set_xlim((first, last) if last > first else (first - 1, first + 1))
    axes.xaxis.set_major_locator(step_locator())
    axes.set_xlabel("step")


def thin(xs: Sequence[float], ys: Sequence[float], most: int = 900) -> tuple[Any, Any]:
    """At most so many points of a curve: the means of equal runs of neighbours."""
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def smooth(ys: Sequence[float], window: int) -> Any:
    """A centred running mean that shortens at both ends and skips what is not finite."""
    y = np.asarray(ys, dtype=float)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(y))
    known = counts[high] - counts[low]
    return np.where(known > 0, (sums[high] - sums[low]) / np.maximum(known, 1), np.nan)
