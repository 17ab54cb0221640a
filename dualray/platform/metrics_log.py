"""`metrics.jsonl`: what a run says about itself, one JSON object a line.

A line is either one optimizer step (`StepMetrics`) or an event, marked by its `event` key. The file
only ever grows by whole lines, each written with one system call, so that killing the process
leaves at most one torn line at the end: readers skip it, and a resumed run cuts it off before it
appends.

JSON has no NaN; a loss that is not finite is written as null and read back as NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from dualray.errors import RunError
from dualray.platform.metrics import (
    EVENTS,
    CheckpointSaved,
    Decided,
    ExpertsMoved,
    Line,
    ModeChange,
    PhaseEntered,
    RunMetrics,
    StepMetrics,
    Yardsticks,
)


class MetricsLog:
    """Appends lines to a metrics file; a context manager.

    A line has reached the operating system when `append` returns, so it survives the death
    of this process (though not of the machine).
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path) -> MetricsLog:
        """Start a new file. Raises RunError if one with lines is already there."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if os.fstat(descriptor).st_size:
            os.close(descriptor)
            raise RunError(
                f"{path} already holds the metrics of a run",
                hint="continue that run with --resume, or give this one another name",
            )
        return cls(path, descriptor)

    @classmethod
    def resume(cls, path: Path, step: int) -> MetricsLog:
        """Continue a file after `step`: what was written about later steps is dropped.

        A missing file is started anew. Raises RunError if a line in the middle is damaged.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.ftruncate(descriptor, _end_of_step(path, step))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def append(self, line: Line) -> None:
        """Write one step or event."""
        text = json.dumps(_to_json(line), allow_nan=False, separators=(",", ":"))
        data = text.encode() + b"\n"
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes fitted into {self.path}")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> RunMetrics:
    """Read a metrics file, ignoring a torn last line, unknown keys and unknown events.

    Raises RunError naming the line if one in the middle is damaged; a missing file reads as
    a run that has not made a step yet.
    """
    steps: list[StepMetrics] = []
    phases: list[PhaseEntered] = []
    decisions: list[Decided] = []
    migrations: list[ExpertsMoved] = []
    checkpoints: list[CheckpointSaved] = []
    yardsticks: Yardsticks | None = None
    mode_changes: list[ModeChange] = []
    if not path.exists():
        return RunMetrics()
    for number, _, record in _records(path):
        line = _from_json(record, path, number)
        if isinstance(line, StepMetrics):
            steps.append(line)
        elif isinstance(line, CheckpointSaved):
            checkpoints.append(line)
        elif isinstance(line, PhaseEntered):
            phases.append(line)
        elif isinstance(line, Decided):
            decisions.append(line)
        elif isinstance(line, ExpertsMoved):
            migrations.append(line)
        elif isinstance(line, Yardsticks):
            yardsticks = line
        elif isinstance(line, ModeChange):
            mode_changes.append(line)
    return RunMetrics(
        steps=tuple(steps),
        phases=tuple(phases),
        decisions=tuple(decisions),
        migrations=tuple(migrations),
        checkpoints=tuple(checkpoints),
        yardsticks=yardsticks,
        mode_changes=tuple(mode_changes),
    )


def _records(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, end offset in bytes, object) of every whole line."""
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            end += len(raw)
            try:
                record = json.loads(raw)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise _damaged(path, number, "is not a JSON object")
            yield number, end, record


def _end_of_step(path: Path, step: int) -> int:
    """Offset in bytes after the last whole line before any that speaks of a later step."""
    end = 0
    for _, line_end, record in _records(path):
        if record.get("step", 0) > step:
            break
        end = line_end
    return end


def _to_json(line: Line) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if not isinstance(line, StepMetrics):
        record["event"] = line.event
    for item in fields(line):
        value = getattr(line, item.name)
        if value is None or (isinstance(value, (Sequence, Mapping)) and not value):
            continue
        record[item.name] = _finite(value)
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _from_json(record: dict[str, Any], path: Path, number: int) -> Line | None:
    event = record.get("event")
    cls = StepMetrics if event is None else EVENTS.get(event)
    if cls is None:
        return None
    names = {item.name for item in fields(cls)}
    values = {key: _parse(key, value) for key, value in record.items() if key in names}
    try:
        return cls(**values)
    except TypeError:
        what = "step" if event is None else f"`{event}` event"
        raise _damaged(path, number, f"lacks keys that a {what} has") from None


def _parse(key: str, value: Any) -> Any:
    if value is None:
        return math.nan
    if key in ("max_vio_per_layer", "max_vio_run_per_layer"):
        return {int(layer): _parse("", item) for layer, item in value.items()}
    if isinstance(value, list):
        return tuple(_parse("", item) for item in value)
    return value


def _damaged(path: Path, number: int, how: str) -> RunError:
    return RunError(
        f"line {number} of {path} {how}",
        hint="remove that line, or restore the file from a copy",
    )
