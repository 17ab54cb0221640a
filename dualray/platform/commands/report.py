"""`dualray report`: the page of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/demo.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default is report.html in the run's folder."),
    ] = None,
) -> None:
    """Write one self-contained HTML page with the plots of a run."""
    # matplotlib takes a third of a second to import, which no other command should pay.
    from dualray.platform.report import write_report

    path = write_report(run_dir, out)
    typer.echo(f"report written to {path}; open it in a browser")
