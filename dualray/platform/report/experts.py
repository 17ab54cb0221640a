"""Load over the steps: heat maps of experts, expert ranks and nodes, and MaxVio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from dualray.platform.metrics import StepMetrics
from dualray.platform.report.loads import LoadHistory, relative_to_mean
from dualray.platform.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    canvas,
    smooth,
    step_axis,
    step_locator,
    thin,
    to_svg,
)

MAX_LAYERS = 12


def layers_shown(loads: LoadHistory) -> tuple[list[int], int]:
    """The MoE layers to draw, evenly chosen if there are many, and how many there are."""
    layers = list(loads.layers)
    if len(layers) <= MAX_LAYERS:
        return layers, len(layers)
    chosen = np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)
    return [layers[index] for index in chosen], len(layers)


def loads_figure(loads: LoadHistory) -> str:
    """One heat map per MoE layer, experts up, steps along, colour by load over the mean."""
    layers, _ = layers_shown(loads)
    columns = 1 if len(layers) <= 3 else 2
    rows = -(-len(layers) // columns)
    with canvas(0.5 + (1.5 if columns == 1 else 1.9) * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for panel, layer in zip(panels.flat, layers):
            image = _heat_map(panel, loads.relative(layer), loads, f"layer-{layer}")
            panel.set_title(f"layer {layer}")
            panel.yaxis.get_major_locator().set_params(integer=True, nbins=5)
            panel.set_ylabel("expert")
        for panel in panels.flat[len(layers) :]:
            panel.set_visible(False)
        for panel in panels.flat[len(layers) - columns : len(layers)]:
            _label_steps(panel)
        _color_bar(figure, image, panels, shrink=0.9 if rows < 3 else 0.5)
        return to_svg(figure, "loads", "Load of every expert over the steps")


def has_places(loads: LoadHistory) -> bool:
    """Whether there is more than one place that experts compute in."""
    return loads.ranks_LRC.shape[1] > 1 or len(loads.nodes) > 1


def places_figure(loads: LoadHistory) -> str:
    """Heat maps of expert ranks and of nodes, where there are several."""
    ranks = range(loads.ranks_LRC.shape[1])
    maps = [
        (title, names, relative_to_mean(places))
        for title, names, places in (
            ("expert rank", [str(rank) for rank in ranks], loads.ranks_LRC),
            ("node", list(loads.nodes), loads.nodes_LNC),
        )
        if len(names) > 1
    ]
    heights = [max(len(names), 3) for _, names, _ in maps]
    with canvas(
        0.9 + 0.5 * len(maps) + 0.22 * sum(min(height, 16) for height in heights)
    ) as figure:
        panels = figure.subplots(
            len(maps), 1, squeeze=False, sharex=True, height_ratios=[min(h, 16) for h in heights]
        )
        for panel, (title, names, relative) in zip(panels.flat, maps):
            image = _heat_map(panel, relative, loads, title.replace(" ", "-"))
            panel.set_title(f"load of every {title}")
            shown = range(0, len(names), -(-len(names) // 16))
            panel.set_yticks(list(shown), [names[index] for index in shown])
        _label_steps(panels[-1, 0])
        _color_bar(figure, image, panels, shrink=0.9)
        return to_svg(figure, "places", "Load of expert ranks and nodes over the steps")


def _heat_map(panel: Axes, relative: np.ndarray, loads: LoadHistory, name: str) -> AxesImage:
    panel.grid(visible=False)
    return panel.imshow(
        relative,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=load_colors(),
        norm=Normalize(0.0, 2.0),
        extent=(loads.first - 0.5, loads.last + 0.5, -0.5, len(relative) - 0.5),
        gid=f"map-of-{name}",  # two of the same pixels would share an id
    )


def _label_steps(panel: Axes) -> None:
    panel.set_xlabel("step")
    panel.tick_params(labelbottom=True)
    panel.xaxis.set_major_locator(step_locator())


def _color_bar(figure: Figure, image: AxesImage, panels: Any, *, shrink: float) -> None:
    bar = figure.colorbar(image, ax=panels, shrink=shrink, pad=0.02)
    bar.set_ticks([0.0, 1.0, 2.0], labels=["idle", "mean", "2x or more"])
    bar.outline.set_visible(False)


def max_vio_figure(steps: Sequence[StepMetrics]) -> str:
    """The largest MaxVio over the layers, of single steps as a running mean, with each layer's
    behind it, and of all steps so far."""
    known = [step for step in steps if step.max_vio is not None]
    xs = [step.step for step in known]
    window = max(1, len(known) // 40)
    with canvas(2.6) as figure:
        axes = figure.add_subplot()
        for index, layer in enumerate(sorted({key for s in known for key in s.max_vio_per_layer})):
            ys = [step.max_vio_per_layer.get(layer, np.nan) for step in known]
            label = "each layer" if index == 0 else None
            axes.plot(*thin(xs, smooth(ys, window)), color=GREY, linewidth=1, label=label)
        marker = "o" if len(xs) < 3 else ""
        worst = smooth([step.max_vio or 0.0 for step in known], window)
        axes.plot(*thin(xs, worst), color=ORANGE, label="worst layer", marker=marker)
        if any(step.max_vio_run is not None for step in known):
            over_run = [np.nan if s.max_vio_run is None else s.max_vio_run for s in known]
            label = "worst layer, all steps so far"
            axes.plot(*thin(xs, over_run), color=PURPLE, label=label, marker=marker)
        axes.axhline(0.0, color=GREEN, linewidth=1.2, linestyle=(0, (5, 4)), label="balance")
        axes.set_ylim(bottom=-0.02 * max(1.0, float(np.nanmax(worst))))
        axes.set_ylabel("MaxVio")
        axes.legend(loc="upper right", ncols=4)
        step_axis(axes, xs)
        return to_svg(figure, "maxvio", "MaxVio over the steps")


def load_colors() -> ListedColormap:
    """From blue (idle) over transparent (mean) to orange (overloaded), for any background."""
    side = np.linspace(1.0, 0.0, 128)
    colors = np.zeros((256, 4))
    for half, color, alpha in ((slice(0, 128), BLUE, side), (slice(128, 256), ORANGE, side[::-1])):
        colors[half, :3] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        colors[half, 3] = alpha
    return ListedColormap(colors)
