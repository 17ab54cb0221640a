"""A simulated schedule as one self-contained SVG: one row a rank, time to the right.

Colour says which stream or leg (blue for direction 0, orange for 1), its shade says which kind
of work, the number is the micro-batch. An overlapped pair is one box with its forward above
its backward. The drawing has a light page of its own, so it reads the same on any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step
from dualray.schedule.simulate import Timeline
from dualray.schedule.words import KIND_WORDS, direction_words, has_pairs, kinds_of

_TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "zb1p": "ZB1P",
    "dualpipev": "DualPipeV",
    "dualpipe": "DualPipe",
}
_FILLS = {
    Kind.FORWARD: ("#a8caf8", "#fad0a8"),
    Kind.INPUT_GRAD: ("#5f98ea", "#ee9a50"),
    Kind.BACKWARD: ("#1f57ad", "#b4571b"),
    Kind.WEIGHT_GRAD: ("#12294d", "#5a270a"),
}
"""Light to dark, so that the kinds stay apart without colour as well."""

_LEFT, _RIGHT = 104.0, 28.0
_LEAST_PLOT, _MOST_PLOT = 1400.0, 2400.0
_TOP, _ROW, _BOX, _BOTTOM = 70.0, 34.0, 28.0, 84.0
_DIGIT = 5.8
"""Width of a digit at the size of the numbers in the boxes, in a wide font."""
_LETTER = 6.6
"""Mean width of a letter at the size of the legend."""

_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1c2126; }
.title { font-size: 19px; font-weight: 650; }
.small { font-size: 12px; fill: #5d666f; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.page { fill: #ffffff; stroke: #c9cfd6; }
.idle { fill: #eef0f3; }
.tick { stroke: #c9cfd6; }
.row text { font-size: 9px; text-anchor: middle; }
.row rect { stroke: #ffffff; stroke-width: 0.8; }
"""


def svg(timeline: Timeline, schedule: Schedule, *, note: str = "") -> str:
    """The timeline as an SVG document; `note` follows the title, such as what the costs are."""
    scale = _scale(timeline)
    width = _LEFT + scale * timeline.makespan + _RIGHT
    height = _TOP + _ROW * len(timeline.rows) + _BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_number(width)} {height:g}" '
            'role="img" aria-labelledby="title">',
            f'<title id="title">{escape(_heading(timeline, schedule))}</title>',
            f"<style>\n{_STYLE}{_fills()}</style>",
            f'<rect class="page" x="0.5" y="0.5" rx="8" width="{_number(width - 1)}" '
            f'height="{height - 1:g}"/>',
            _text(20, 34, _heading(timeline, schedule), "title"),
            _text(width - _RIGHT, 34, _subtitle(timeline, note), "small end"),
            *_axis(timeline, scale),
            *(_row(timeline, schedule, rank, scale) for rank in range(len(timeline.rows))),
            *_legend(schedule, height - 24),
            "</svg>\n",
        ]
    )


def _scale(timeline: Timeline) -> float:
    """Pixels a unit of time, so that two digits fit into the shortest step if at all possible."""
    shortest = min(end - start for row in timeline.rows for _, start, end in row if end > start)
    wanted = 2.2 * _DIGIT / shortest * timeline.makespan
    return min(max(wanted, _LEAST_PLOT), _MOST_PLOT) / timeline.makespan


def _heading(timeline: Timeline, schedule: Schedule) -> str:
    stages = f" ({schedule.num_stages} stages)" if schedule.num_stages > schedule.num_ranks else ""
    return (
        f"{_TITLES.get(schedule.kind, schedule.kind)}: {schedule.num_ranks} ranks{stages}, "
        f"{schedule.num_micro_batches} micro-batches, bubble {timeline.bubble:.1%}"
    )


def _subtitle(timeline: Timeline, note: str) -> str:
    live = max(timeline.peaks.activations)
    return f"{f'{note}; ' if note else ''}at most {live} live micro-batches a rank"


def _axis(timeline: Timeline, scale: float) -> Iterator[str]:
    bottom = _TOP + _ROW * len(timeline.rows)
    step = _tick(timeline.makespan)
    for index in range(int(timeline.makespan / step) + 1):
        x = _LEFT + index * step * scale
        yield f'<path class="tick" d="M{_number(x)} {_TOP:g}V{bottom + 4:g}"/>'
        yield _text(x, bottom + 18, f"{index * step:g}", "small middle")
    yield _text(_LEFT - 12, bottom + 18, "time", "small end")


def _tick(makespan: float) -> float:
    """1, 2 or 5 times a power of ten, for about 15 ticks."""
    rough = makespan / 15
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)


def _row(timeline: Timeline, schedule: Schedule, rank: int, scale: float) -> str:
    plot = scale * timeline.makespan
    y = _TOP + _ROW * rank
    top = y + (_ROW - _BOX) / 2
    stages = ", ".join(map(str, schedule.stage_of[rank]))
    word = "stages" if schedule.num_directions > 1 else "stage"
    lines = [
        _text(_LEFT - 12, y + 15, f"rank {rank}", "end"),
        _text(_LEFT - 12, y + 28, f"{word} {stages}", "small end"),
        f'<rect class="idle" x="{_LEFT:g}" y="{top:g}" width="{_number(plot)}" height="{_BOX:g}"/>',
        '<g class="row">',
    ]
    for step, start, end in timeline.rows[rank]:
        lines += _box(step, _LEFT + start * scale, top, (end - start) * scale)
    return "\n".join([*lines, "</g>"])


def _box(step: Step, x: float, y: float, width: float) -> Iterator[str]:
    if isinstance(step, Overlap):
        yield from _half(step.forward, x, y, width, _BOX / 2)
        yield from _half(step.backward, x, y + _BOX / 2, width, _BOX / 2)
    elif width:
        yield from _half(step, x, y, width, _BOX)


def _half(action: Action, x: float, y: float, width: float, height: float) -> Iterator[str]:
    yield (
        f'<rect class="{_class(action.kind, action.direction)}" x="{_number(x)}" y="{y:g}" '
        f'width="{_number(width)}" height="{height:g}"/>'
    )
    text = str(action.micro_batch)
    if len(text) * _DIGIT <= width:
        on_dark = action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD)
        yield _text(x + width / 2, y + height / 2 + 3.2, text, "light" if on_dark else "")


def _class(kind: Kind, direction: int) -> str:
    return f"{kind.value}{direction}"


def _fills() -> str:
    rules = [
        f".{_class(kind, direction)} {{ fill: {fill}; }}\n"
        for kind, fills in _FILLS.items()
        for direction, fill in enumerate(fills)
    ]
    return "".join([*rules, ".row .light { fill: #ffffff; }\n"])


def _legend(schedule: Schedule, y: float) -> Iterator[str]:
    directions = range(schedule.num_directions)
    entries = [
        (
            [[_class(kind, direction)] for direction in directions],
            f"{kind.value} {KIND_WORDS[kind]}",
        )
        for kind in kinds_of(schedule)
    ]
    if has_pairs(schedule):
        pair = [_class(Kind.FORWARD, 0), _class(Kind.BACKWARD, 1)]
        entries.append(([pair], "overlapped pair"))
    entries.append(([["idle"]], "idle"))
    names = direction_words(schedule)
    if names:
        entries.append(([], ", ".join(f"{c}: {n}" for c, n in zip(("blue", "orange"), names))))
    x = _LEFT
    for swatches, text in entries:
        for stack in swatches:
            height = 16 / len(stack)
            for at, name in enumerate(stack):
                yield (
                    f'<rect class="{name}" x="{_number(x)}" y="{y - 13 + at * height:g}" '
                    f'width="16" height="{height:g}"/>'
                )
            x += 18
        yield _text(x + 5, y, text)
        x += 30 + _LETTER * len(text)


def _text(x: float, y: float, text: str, classes: str = "") -> str:
    named = f' class="{classes}"' if classes else ""
    return f'<text{named} x="{_number(x)}" y="{_number(y)}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
