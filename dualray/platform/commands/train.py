"""`dualray train` and `dualray serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, as train.steps=100."),
]


def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    address: Annotated[
        str | None, typer.Option(help="Head of a running Ray cluster, HOST:PORT or auto.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's newest checkpoint.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train a run, then serve it from the same actors if the run file says so."""
    from dualray.platform.console import Console
    from dualray.platform.launch import launch, plan_training
    from dualray.platform.run_file import load_run_file

    settings = list(overrides or ())
    if address is not None:
        settings.append(f"cluster.address={address}")
    run = load_run_file(run_file, settings)
    with Console(log_every=run.train.log_every) as console:
        assignment = plan_training(run, resume=resume, console=console)
        launch(assignment, console)
        if assignment.folder.metrics.is_file():
            console.note(f"next: dualray report runs/{run.name}")


def serve(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (step-N) or the folder of a run.")
    ],
    address: Annotated[
        str | None, typer.Option(help="Head of a running Ray cluster, HOST:PORT or auto.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Bring workers up from a checkpoint and serve it."""
    from dualray.platform.console import Console
    from dualray.platform.launch import launch, plan_serving

    settings = list(overrides or ())
    if address is not None:
        settings.append(f"cluster.address={address}")
    with Console() as console:
        launch(plan_serving(checkpoint, settings, console=console), console)
