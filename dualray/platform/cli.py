"""The command line: assembles the commands and turns errors into one sentence.

New settings are fields of the run file, never new flags here; a test freezes this surface.
"""

from __future__ import annotations

import sys

import typer

import dualray
from dualray.errors import DualrayError
from dualray.platform.commands import (
    bench,
    checkpoint,
    data,
    generate,
    k8s,
    live,
    mode,
    plan,
    report,
    schedule,
    score,
    submit,
    train,
)

app = typer.Typer(
    name="dualray",
    help="Train DeepSeek-V3-style models on Ray, serve them from the same actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("serve")(train.serve)
app.command("generate")(generate.generate_command)
app.command("score")(score.score)
app.command("status")(live.status)
app.command("stop")(live.stop)
app.command("mode")(mode.mode)
app.command("submit")(submit.submit)
app.command("logs")(submit.logs)
app.command("plan")(plan.plan)
app.command("schedule")(schedule.schedule_command)
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(k8s.app, name="k8s")
app.add_typer(bench.app, name="bench")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dualray {dualray.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True),
) -> None:
    pass


def main() -> None:
    """Entry point. A user's mistake ends with exit code 2 and no traceback."""
    try:
        app()
    except DualrayError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise  # nobody's path, so nobody's mistake
        name = str(error.filename)
        name = name if len(name) < 200 else f"{name[:97]}...{name[-97:]}"
        typer.echo(f"error: {name} cannot be used ({error.strerror}); check the path.", err=True)
        sys.exit(DualrayError.exit_code)


if __name__ == "__main__":
    main()
