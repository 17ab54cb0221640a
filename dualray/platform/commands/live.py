"""`dualray status` and `dualray stop`: looking at runs from another terminal.

Local runs are found by their folder, submitted ones by the dashboard they were sent to.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.errors import ConfigError

Address = Annotated[
    str | None,
    typer.Option(help="For a submitted run: the head's dashboard, http://HOST:8265."),
]


def status(
    run: Annotated[
        str | None,
        typer.Argument(help="Name or folder of a run, or a job; all runs here if left out."),
    ] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what runs are doing."""
    if address is not None:
        _job_status(_required(run), address, as_json)
        return
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
    run: Annotated[str, typer.Argument(help="Name or folder of a run, or a job.")],
    address: Address = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 120.0,
) -> None:
    """End a run after its present step, with a committed checkpoint."""
    if address is not None:
        from dualray.platform.submit import job_stop

        job = job_stop(address, run)
        typer.echo(f"job {job.submission_id} is {job.status.lower()}")
        return
    from dualray.platform.folder import RunFolder
    from dualray.platform.live import end

    typer.echo(end(RunFolder.find(run), timeout_s))


def _required(run: str | None) -> str:
    if run is None:
        raise ConfigError(
            "--address was given without the name of a job",
            hint="write dualray status JOB --address http://HOST:8265",
        )
    return run


def _job_status(name: str, address: str, as_json: bool) -> None:
    from dualray.platform.submit import job_status

    job = job_status(address, name)
    if as_json:
        typer.echo(json.dumps(asdict(job), indent=1))
        return
    typer.echo(f"job {job.submission_id} is {job.status.lower()}: {job.message}")
    typer.echo(f"next: dualray logs {job.submission_id} --address {address}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "workers", "gRPC"):
        table.add_column(column)
    for row in rows:
        steps = f"{row.get('step', '-')}/{row.get('steps', '-')}"
        pids = " ".join(str(w["pid"]) for w in row["workers"])
        table.add_row(row["name"], row["state"], steps, pids, row.get("target") or "-")
    return table
