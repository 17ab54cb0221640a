"""What every benchmark does with its figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


def deliver(
    line: dict[str, Any],
    record: Path | None,
    show: Callable[[dict[str, Any]], None],
    *,
    as_json: bool,
) -> None:
    """Append the line to `record`, if there is one, and print it: for programs, or by `show`."""
    # torch, whose version a record states, takes seconds to import.
    from dualray.platform.bench.record import append

    if record is not None:
        append(record, line)
    if as_json:
        typer.echo(json.dumps(line))
        return
    show(line)
    if record is not None:
        typer.echo(f"appended to {record}")
