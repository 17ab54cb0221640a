"""A simulated schedule as text: one row a rank, time to the right, for a terminal.

Labels are short because cells are narrow: the letter is the kind, upper case for direction 0
and lower case for direction 1 (the two legs of a V), the number is the micro-batch. `F3b1` is
an overlapped pair.
"""

from __future__ import annotations

from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step
from dualray.schedule.simulate import Timeline
from dualray.schedule.words import KIND_WORDS, direction_words, has_pairs, kinds_of


def legend(schedule: Schedule) -> str:
    """What the letters that this schedule uses mean."""
    words = [f"{kind.value} {KIND_WORDS[kind]}" for kind in kinds_of(schedule)]
    if has_pairs(schedule):
        words.append("F3b1 overlapped pair")
    cases = [
        f"{case} case {name}" for case, name in zip(("upper", "lower"), direction_words(schedule))
    ]
    return "; ".join([", ".join(words), *([", ".join(cases)] if cases else []), "'.' idle"])


def render(timeline: Timeline, *, width: int = 120) -> str:
    """The timeline in lines of at most `width` characters, wrapped into panels.

    Columns are proportional to time. A label that does not fit its step is cut, so steps much
    shorter than a forward may show only a letter, or nothing when they cost nothing.
    """
    if not timeline.makespan:
        return ""
    longest = max(len(label(step)) for row in timeline.rows for step, _, _ in row)
    unit = min(
        end - start
        for row in timeline.rows
        for step, start, end in row
        if isinstance(step, Overlap) or step.kind is not Kind.WEIGHT_GRAD
    )
    # One column of each step is its separator; a pair needs its whole label within its cost.
    per_unit = 1 + max(
        len(label(step)) * unit / (end - start)
        for row in timeline.rows
        for step, start, end in row
        if end - start >= unit
    )
    scale = min(per_unit, longest + 1) / unit
    lines = [_row(row, scale, round(timeline.makespan * scale)) for row in timeline.rows]
    margin = len(f"{len(lines) - 1} ")
    panel = max(width - margin, longest + 1)
    panels = [
        "\n".join(
            f"{rank:>{margin - 1}} {line[at : at + panel]}" for rank, line in enumerate(lines)
        )
        for at in range(0, len(lines[0]), panel)
    ]
    return "\n\n".join(panels)


def label(step: Step) -> str:
    """The short text of a step."""
    if isinstance(step, Overlap):
        return label(step.forward) + label(step.backward)
    return _action_label(step)


def _action_label(action: Action) -> str:
    letter = action.kind.value if action.direction == 0 else action.kind.value.lower()
    return letter if action.kind is Kind.WEIGHT_GRAD else f"{letter}{action.micro_batch}"


def _row(row: tuple[tuple[Step, float, float], ...], scale: float, length: int) -> str:
    cells = ["."] * length
    for step, start, end in row:
        first, last = round(start * scale), round(end * scale)
        if last > first:
            text = label(step)[: max(last - first - 1, 1)].ljust(last - first)
            cells[first:last] = text
    return "".join(cells)


def summary(schedule: Schedule, timeline: Timeline) -> str:
    """Two or three lines for a person: sizes, bubble and memory."""
    busiest = max(timeline.idle)
    return (
        f"{schedule.kind}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches, "
        f"verified\n"
        f"makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%}, "
        f"idle per rank {min(timeline.idle):g} to {busiest:g}\n"
        f"peak live micro-batches per rank {_counts(timeline.peaks.activations)}, "
        f"peak queued weight gradients {_counts(timeline.peaks.deferred)}"
    )


def _counts(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
