"""`dualray schedule`: shows, checks and simulates a pipeline schedule."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from dualray.errors import ConfigError
from dualray.platform.trace import Category, Span, Trace, write_trace
from dualray.schedule.actions import Schedule
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.render import legend, render, summary
from dualray.schedule.simulate import Costs, Timeline, simulate
from dualray.schedule.verify import verify

_OPTIONS = {
    "layout.schedule": "KIND",
    "layout.pipeline": "--ranks",
    "train.micro_batches": "--chunks",
}
_UNIT_S = 1e-3
"""What one unit of the costs is drawn as in a trace."""


def schedule_command(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS), show_default=False)],
    ranks: Annotated[int, typer.Option(help="pipeline ranks P")],
    chunks: Annotated[int, typer.Option(help="micro-batches of a step, both directions together")],
    costs: Annotated[
        str, typer.Option(metavar="F,I,W,FB", help="durations of a step of each kind, in any unit")
    ] = "1,1,1,3",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="write a trace for Perfetto, a unit of the costs as 1 ms"
        ),
    ] = None,
) -> None:
    """Show, check and simulate a pipeline schedule."""
    try:
        schedule = make_schedule(kind, ranks, chunks)
    except ConfigError as error:
        raise _in_option_words(error) from None
    table = parse_costs(costs)
    verify(schedule)
    timeline = simulate(schedule, table)
    if trace is not None:
        write_timeline(trace, timeline)
    if as_json:
        typer.echo(json.dumps(as_dict(schedule, timeline)))
    elif trace is not None:
        typer.echo(f"{summary(schedule, timeline)}\n\nopen {trace} at https://ui.perfetto.dev")
    else:
        typer.echo(render(timeline, width=shutil.get_terminal_size((120, 24)).columns))
        typer.echo(f"{legend(schedule)}\n\n{summary(schedule, timeline)}")


def parse_costs(text: str) -> Costs:
    """`F,I,W,FB` as numbers; raises ConfigError naming --costs."""
    try:
        forward, input_grad, weight_grad, overlapped = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--costs is {text} and must be four numbers F,I,W,FB", hint="try --costs 1,1,1,3"
        ) from None
    return Costs(
        forward=forward, input_grad=input_grad, weight_grad=weight_grad, overlapped=overlapped
    )


def as_dict(schedule: Schedule, timeline: Timeline) -> dict[str, Any]:
    """The object that `--json` prints; times are in the unit of the costs."""
    return {
        "kind": schedule.kind,
        "ranks": schedule.num_ranks,
        "chunks": schedule.num_micro_batches,
        "actions": [[str(step) for step in steps] for steps in schedule.steps],
        "makespan": timeline.makespan,
        "idle": list(timeline.idle),
        "bubble": timeline.bubble,
        "peak_activations": list(timeline.peaks.activations),
        "peak_deferred": list(timeline.peaks.deferred),
    }


def write_timeline(path: Path, timeline: Timeline) -> None:
    """Write the simulation as a Chrome trace; raises ConfigError naming --trace."""
    spans = tuple(
        Span(rank, str(step), Category.COMPUTE, start * _UNIT_S, end * _UNIT_S)
        for rank, row in enumerate(timeline.rows)
        for step, start, end in row
    )
    names = {rank: f"rank {rank}" for rank in range(len(timeline.rows))}
    try:
        # The trace is written beside its place and moved there, which only a file survives.
        if path.exists() and not path.is_file():
            raise OSError(None, "it is not a file")
        write_trace(path, Trace(spans), worker_names=names)
    except OSError as error:
        raise ConfigError(
            f"--trace is {path} and cannot be written ({error.strerror})",
            hint="give a file in a folder that exists and that you may write to",
        ) from None


def _in_option_words(error: ConfigError) -> ConfigError:
    sentence, hint = error.sentence, error.hint
    for field, option in _OPTIONS.items():
        sentence, hint = sentence.replace(field, option), hint.replace(field, option)
    return ConfigError(sentence, hint=hint)
