"""Expert load over the steps, as a heat map per MoE layer, and MaxVio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import ListedColormap, Normalize

from dualray.platform.metrics import StepMetrics
from dualray.platform.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    canvas,
    smooth,
    step_axis,
    step_locator,
    thin,
    to_svg,
)

MAX_LAYERS = 12
MAX_COLUMNS = 240


def layers_shown(steps: Sequence[StepMetrics]) -> tuple[list[int], int]:
    """The MoE layers to draw, evenly chosen if there are many, and how many there are."""
    layers = sorted({layer for step in steps for layer in step.loads})
    if len(layers) <= MAX_LAYERS:
        return layers, len(layers)
    chosen = np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)
    return [layers[index] for index in chosen], len(layers)


def relative_loads(steps: Sequence[StepMetrics], layer: int) -> tuple[np.ndarray, int, int]:
    """Loads of one layer over their mean, (experts, columns), and the first and last step.

    Neighbouring steps share a column if there are more than MAX_COLUMNS; the load of a column
    is the sum over its steps, so the mean of every column is 1.
    """
    known = [step for step in steps if step.loads.get(layer)]
    loads = np.asarray([step.loads[layer] for step in known], dtype=float)
    columns = min(len(known), MAX_COLUMNS)
    edges = np.linspace(0, len(known), columns + 1).astype(int)[:-1]
    summed = np.add.reduceat(loads, edges, axis=0)
    mean = summed.mean(axis=1, keepdims=True)
    return (summed / np.where(mean > 0, mean, 1.0)).T, known[0].step, known[-1].step


def loads_figure(steps: Sequence[StepMetrics]) -> str:
    """One heat map per MoE layer, experts up, steps along, colour by load over the mean."""
    layers, _ = layers_shown(steps)
    columns = 1 if len(layers) <= 3 else 2
    rows = -(-len(layers) // columns)
    scale = Normalize(0.0, 2.0)
    with canvas(0.5 + (1.5 if columns == 1 else 1.9) * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
        image = None
        for panel, layer in zip(panels.flat, layers):
            relative, first, last = relative_loads(steps, layer)
            extent = (first - 0.5, last + 0.5, -0.5, len(relative) - 0.5)
            image = panel.imshow(
                relative,
                aspect="auto",
                origin="lower",
                interpolation="nearest",
                cmap=load_colors(),
                norm=scale,
                extent=extent,
            )
            panel.set_title(f"layer {layer}")
            panel.grid(visible=False)
            panel.yaxis.get_major_locator().set_params(integer=True, nbins=5)
            panel.set_ylabel("expert")
        for panel in panels.flat[len(layers) :]:
            panel.set_visible(False)
        for panel in panels.flat[len(layers) - columns : len(layers)]:
            panel.set_xlabel("step")
            panel.tick_params(labelbottom=True)
            panel.xaxis.set_major_locator(step_locator())
        if image is not None:
            bar = figure.colorbar(image, ax=panels, shrink=0.9 if rows < 3 else 0.5, pad=0.02)
            bar.set_ticks([0.0, 1.0, 2.0], labels=["idle", "mean", "2x or more"])
            bar.outline.set_visible(False)
        return to_svg(figure, "loads", "Load of every expert over the steps")


def max_vio_figure(steps: Sequence[StepMetrics]) -> str:
    """The largest MaxVio over the layers, with each layer's running mean behind it."""
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
        axes.axhline(0.0, color=GREEN, linewidth=1.2, linestyle=(0, (5, 4)), label="balance")
        axes.set_ylim(bottom=-0.02 * max(1.0, float(np.nanmax(worst))))
        axes.set_ylabel("MaxVio")
        axes.legend(loc="upper right", ncols=3)
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
