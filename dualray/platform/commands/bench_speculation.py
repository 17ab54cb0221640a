"""`dualray bench speculation`: what drafts of a trained model's MTP modules are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dualray.errors import ConfigError
from dualray.platform.commands.bench_output import deliver


def speculation(
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="a trained model; without one, one is trained first"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="token shards with its held-out text")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a tiny model, in a minute; says little")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Drafts accepted, and tokens a second with drafts and without, of the same requests.

    The demo model is trained on Shakespeare for it, which takes about ten minutes on two cores, and
    the comparison about as long.
    """
    # torch takes seconds to import, which no other command should pay.
    from dualray.platform.bench.record import check_target, new_record
    from dualray.platform.bench.serve_speculation import case_dict, speculation_rows
    from dualray.platform.bench.serve_speculation_result import speculation_goals

    if (checkpoint is None) != (data is None):
        raise ConfigError(
            f"--checkpoint is {checkpoint} and --data is {data}, and a trained model needs both",
            hint="give the run's checkpoint and its data.path, or neither",
        )
    check_target(record)
    with Console(stderr=True).status("speculation") as status:
        rows = speculation_rows(status.update, quick=quick, checkpoint=checkpoint, data=data)
    goals = [
        {"words": words, "value": value, "met": met}
        for words, value, met in speculation_goals(rows)
    ]
    line = new_record("speculation", case_dict(quick), rows) | {"goals": goals}
    deliver(line, record, _show, as_json=as_json)


def _show(line: dict[str, Any]) -> None:
    from dualray.platform.bench.serve_speculation_result import speculation_sentences

    machine, versions = line["machine"], line["versions"]
    typer.echo(f"speculation, {machine['cpu']}, one thread; torch {versions['torch']}")
    for sentence in speculation_sentences(line["results"]):
        typer.echo(sentence)
    for goal in line["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        typer.echo(f"goal: {goal['words']}: {goal['value']:.4g}, {verdict}")
