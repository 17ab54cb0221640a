"""`dualray submit` and `dualray logs`: runs as Ray jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[str, typer.Option(help="The head's dashboard, http://HOST:8265.")]


def submit(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    address: Address,
    follow: Annotated[bool, typer.Option(help="Show the log until the run ends.")] = True,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the run file.")
    ] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="Name of the job; the run's if not given.")
    ] = None,
    workspace: Annotated[
        str, typer.Option(help="Folder on the cluster that relative paths and runs/ begin in.")
    ] = "~/dualray",
) -> None:
    """Train on a Ray cluster as a job; the exit code is the run's."""
    from dualray.platform import submit as jobs

    job = jobs.submit(
        run_file, address, overrides=set_ or (), submission_id=id_, workspace=workspace
    )
    typer.echo(f"job {job.submission_id} is accepted by {address}")
    if follow:
        _follow(address, job.submission_id)
    _say_next(address, job.submission_id)


def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of a submitted job.")],
    address: Address,
    follow: Annotated[bool, typer.Option(help="Go on until the job ends.")] = False,
) -> None:
    """Show the log of a submitted run."""
    from dualray.platform import submit as jobs

    if follow:
        _follow(address, job)
    typer.echo(jobs.job_logs(address, job), nl=False)


def _follow(address: str, submission_id: str) -> None:
    from dualray.platform import submit as jobs

    try:
        code = jobs.follow(address, submission_id, _write)
    except KeyboardInterrupt:
        typer.echo(f"\njob {submission_id} goes on without this terminal")
        _say_next(address, submission_id)
        code = 130
    raise typer.Exit(code)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say_next(address: str, submission_id: str) -> None:
    typer.echo(f"next: dualray logs {submission_id} --address {address} --follow")
    typer.echo(f"      dualray stop {submission_id} --address {address}")
