"""`dualray status` and `dualray stop`: looking at runs from another terminal."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def status(
    run: Annotated[
        str | None, typer.Argument(help="Name or folder of a run; all runs here if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what runs are doing."""
    from dualray.platform.folder import RUNS, RunFolder
    from dualray.platform.live import look

    if run is not None:
        folders = [RunFolder.find(run)]
    else:
        folders = [RunFolder(p.parent.absolute()) for p in sorted(RUNS.glob("*/run.json"))]
    rows = [look(folder) for folder in folders]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    Console().print(_table(rows))
    if not rows:
        typer.echo("no run was started here; next: dualray train RUN.yaml")


def stop(
    run: Annotated[str, typer.Argument(help="Name or folder of a run.")],
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 120.0,
) -> None:
    """End a run after its present step, with a committed checkpoint."""
    from dualray.platform.folder import RunFolder
    from dualray.platform.live import end

    typer.echo(end(RunFolder.find(run), timeout_s))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "workers", "gRPC"):
        table.add_column(column)
    for row in rows:
        steps = f"{row.get('step', '-')}/{row.get('steps', '-')}"
        pids = " ".join(str(w["pid"]) for w in row["workers"])
        table.add_row(row["name"], row["state"], steps, pids, row.get("target") or "-")
    return table
