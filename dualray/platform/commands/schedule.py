"""`dualray schedule`: shows, checks and simulates a pipeline schedule."""

from __future__ import annotations

import json
import shutil
from typing import Annotated, Any

import typer

from dualray.errors import ConfigError
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule
from dualray.schedule.render import LEGEND, render, summary
from dualray.schedule.simulate import Costs, Timeline, simulate
from dualray.schedule.verify import verify

_OPTIONS = {
    "layout.schedule": "KIND",
    "layout.pipeline": "--ranks",
    "train.micro_batches": "--chunks",
}


def schedule_command(
    kind: Annotated[str, typer.Argument(help="dualpipe or 1f1b", show_default=False)],
    ranks: Annotated[int, typer.Option(help="pipeline ranks P")],
    chunks: Annotated[int, typer.Option(help="micro-batches of a step, both directions together")],
    costs: Annotated[
        str, typer.Option(metavar="F,I,W,FB", help="durations of a step of each kind, in any unit")
    ] = "1,1,1,3",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Show, check and simulate a pipeline schedule."""
    try:
        schedule = make_schedule(kind, ranks, chunks)
    except ConfigError as error:
        raise _in_option_words(error) from None
    table = parse_costs(costs)
    verify(schedule)
    timeline = simulate(schedule, table)
    if as_json:
        typer.echo(json.dumps(as_dict(schedule, timeline)))
        return
    typer.echo(render(timeline, table, width=shutil.get_terminal_size((120, 24)).columns))
    typer.echo(f"{LEGEND}\n\n{summary(schedule, timeline)}")


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


def _in_option_words(error: ConfigError) -> ConfigError:
    sentence, hint = error.sentence, error.hint
    for field, option in _OPTIONS.items():
        sentence, hint = sentence.replace(field, option), hint.replace(field, option)
    return ConfigError(sentence, hint=hint)
