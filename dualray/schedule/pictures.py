"""The drawings in docs/schedules, of every kind for the same 8 stages and 20 micro-batches.

`python -m dualray.schedule.pictures docs/schedules` writes them anew; a test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import Costs, simulate
from dualray.schedule.svg import svg

_COSTS = Costs(forward=1, input_grad=1, weight_grad=1, overlapped=3)
_NOTE = "F = I = W = 1, F&B = 3"


def pictures() -> dict[str, str]:
    """File name to SVG."""
    drawn = {}
    for kind in KINDS:
        schedule = make_schedule(kind, 4 if kind == "dualpipev" else 8, 20)
        drawn[f"{kind}.svg"] = svg(simulate(schedule, _COSTS), schedule, note=_NOTE)
    return drawn


def write(folder: Path) -> None:
    """Write every picture into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
