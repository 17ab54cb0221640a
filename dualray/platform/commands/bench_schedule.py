"""`dualray bench schedule`: measured steps of the five schedules beside their simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.errors import ConfigError
from dualray.platform.commands.bench_output import deliver

MOST_RANKS = 16
"""Each rank is a process that imports torch: 0.3 GB and seconds of a core."""
_LETTERS = {
    "forward": "F",
    "input_grad": "I",
    "weight_grad": "W",
    "backward": "B",
    "overlapped": "F&B",
}


def schedule(
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="P,...",
            help="pipeline ranks, one comparison each; by default 4,8, and 4 with --quick",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="short stages and 4 ranks, in half a minute")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Step times of all five schedules, measured in real processes and simulated.

    Stages sleep instead of computing, so that 8 ranks fit on two cores. Some 4 minutes.
    """
    asked = None if ranks is None else parse_ranks(ranks)
    # torch takes seconds to import, which no other command should pay.
    from dualray.platform.bench import schedule as bench
    from dualray.platform.bench.record import check_target, new_record

    check_target(record)
    workload = bench.QUICK if quick else bench.FULL
    with Console(stderr=True).status("") as status:
        results = bench.compare(workload, asked or workload.ranks, on_part=status.update)
    line = new_record("schedule", bench.config_dict(workload), results)
    deliver(line, record, _show, as_json=as_json)


def parse_ranks(text: str) -> tuple[int, ...]:
    """`P,...` as numbers; raises ConfigError naming --ranks."""
    parts = text.split(",")
    ranks = tuple(int(part) for part in parts if part.strip().isdecimal())
    if len(ranks) < len(parts) or any(p % 2 or not 2 <= p <= MOST_RANKS for p in ranks):
        raise ConfigError(
            f"--ranks is {text} and must be even numbers from 2 to {MOST_RANKS}, separated by "
            "commas (dualpipe needs them even)",
            hint="try --ranks 4,8",
        )
    return ranks


def _show(line: dict[str, Any]) -> None:
    machine, config = line["machine"], line["config"]
    typer.echo(
        f"schedule, {config['steps']} steps each, {machine['cpu']}, {machine['cores']} cores; "
        f"torch {line['versions']['torch']}"
    )
    steps = ("simulated", "measured", "ratio")
    table = Table("ranks", "schedule", *steps, "bubble sim.", "meas.", "live", box=None)
    for column in table.columns:
        column.justify = "right"
    for result in line["results"]:
        for row in result["schedules"]:
            table.add_row(
                str(result["ranks"]),
                row["schedule"],
                f"{row['simulated_s']:.3f} s",
                f"{row['measured_s']:.3f} s",
                f"{row['ratio']:.3f}",
                f"{row['simulated_bubble']:.1%}",
                f"{row['measured_bubble']:.1%}",
                str(row["peak_activations"]),
            )
    Console().print(table)
    for result in line["results"]:
        typer.echo(_summary(result))
    typer.echo(
        "simulated with the costs measured by themselves; measured: the slowest rank, the median "
        "over steps; bubble: the idle share of all ranks' time; live: most micro-batches that a "
        "rank holds, counted twice with half a stage each under dualpipev"
    )


def _summary(result: dict[str, Any]) -> str:
    whole = result["stages"][-1]
    costs = ", ".join(
        f"{letter} {1e3 * whole['measured'][name]:.1f} ({1e3 * whole['nominal'][name]:g})"
        for name, letter in _LETTERS.items()
    )
    order = "as published" if result["order_holds"] else "not as published"
    return (
        f"{result['ranks']} ranks, {result['micro_batches']} micro-batches: costs of a stage in "
        f"ms, measured (slept): {costs}; a message {1e3 * result['exchange_s']:.2f} ms. Order "
        f"{order} (gpipe = 1f1b > zb1p > dualpipev, dualpipe); the worst ratio is "
        f"{result['worst_ratio']:.3f}"
    )
