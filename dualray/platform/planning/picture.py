"""The scale curves as a picture: speed of a GPU, and days a trillion tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dualray.platform.planning import published
from dualray.platform.planning.scale import SIZES, Point, Scale
from dualray.platform.planning.setting import Setting
from dualray.platform.report.style import BLUE, GREEN, MUTED, ORANGE, PAPER, canvas

_CURVES = (("grown_batch", ORANGE), ("same_batch", BLUE))


def write_picture(setting: Setting, scale: Scale, path: Path) -> None:
    """Writes an SVG that stands alone. Raises OSError if the path cannot be written."""
    batches = {
        "same_batch": f"{setting.num_sequences} sequences a step",
        "grown_batch": "sequences in proportion to GPUs",
    }
    with canvas(4.4) as drawing, mpl.rc_context({"svg.hashsalt": "plan"}):
        drawing.set_facecolor(PAPER)
        speed, days = drawing.subplots(1, 2, width_ratios=(3, 2))
        speed.set_title("tokens a second per GPU")
        days.set_title("days a trillion tokens")
        for name, color in _CURVES:
            points = [
                (each.num_gpus, each.estimate)
                for each in getattr(scale, name)
                if each.estimate is not None
            ]
            sizes = [size for size, _ in points]
            rates = [each.tokens_per_s_per_gpu for _, each in points]
            lasting = [each.days_per_trillion for _, each in points]
            for axes, values in ((speed, rates), (days, lasting)):
                axes.plot(sizes, values, "o-", color=color, markersize=4, label=batches[name])
        _mark_published(speed, days, setting)
        for axes in (speed, days):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlim(SIZES[0] / 1.3, SIZES[-1] * 1.3)
        speed.set_ylim(bottom=0)
        speed.set_xticks(SIZES, labels=[_tick(each) for each in scale.same_batch], fontsize=8)
        speed.set_xlabel(f"GPUs; fastest pipeline x experts x replicas at {batches['same_batch']}")
        speed.legend(loc="lower left")
        days.set_xticks(SIZES, labels=[str(size) for size in SIZES], fontsize=8)
        days.set_xlabel("GPUs")
        days.set_yscale("log")
        days.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        days.yaxis.set_minor_locator(NullLocator())
        days.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        drawing.suptitle(
            f"{setting.name} on {setting.cluster.hardware.title}",
            x=0.01,
            ha="left",
            fontsize=11,
            color=MUTED,
        )
        drawing.savefig(path, format="svg", metadata={"Date": None})


def _tick(point: Point) -> str:
    """A size, and below it the fastest layout."""
    if point.estimate is None:
        return f"{point.num_gpus}\nnone fits"
    layout = point.estimate.candidate
    sizes = f"{layout.pipeline}x{layout.experts}x{layout.replicas}"
    return f"{point.num_gpus}\n{sizes}\n{layout.schedule}"


def _mark_published(speed: Axes, days: Axes, setting: Setting) -> None:
    cluster = setting.cluster
    if setting.name != published.MODEL or cluster.hardware.name != published.PROFILE:
        return
    at = published.NUM_GPUS
    label = "published by DeepSeek"
    speed.plot(at, published.TOKENS_PER_S_PER_GPU, "*", color=GREEN, markersize=11, label=label)
    days.plot(at, published.GPU_HOURS_PER_TRILLION / at / 24, "*", color=GREEN, markersize=11)
