"""`dualray bench overlap`: what overlapped pairs hide of the communication between two hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver

_LINKS = {"free": "free link", "shaped": "slow link"}


def overlap(
    quick: Annotated[
        bool, typer.Option("--quick", help="a small model, in half a minute; says little")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Steps without communication, sequential and overlapped, on two emulated hosts.

    The hosts are network namespaces joined by a link whose rate makes communication take about as
    long as computation: needs root and iproute2. Some 3 minutes.
    """
    # torch takes seconds to import, which no other command should pay.
    from dualray.platform.bench import overlap as bench
    from dualray.platform.bench.record import check_target, new_record

    check_target(record)
    case = bench.QUICK if quick else bench.FULL
    with Console(stderr=True).status("") as status:
        results = bench.compare_overlap(case, on_part=status.update)
    line = new_record("overlap", bench.config_dict(case), results)
    deliver(line, record, _show, as_json=as_json)


def _show(line: dict[str, Any]) -> None:
    machine = line["machine"]
    typer.echo(
        f"overlap, {machine['cpu']}, {machine['cores']} cores, one process of one thread a host; "
        f"torch {line['versions']['torch']}"
    )
    table = Table(
        "link", "rate", "no communication", "sequential", "overlapped", "hidden", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in line["results"]:
        rate = row["rate_bits_per_s"]
        table.add_row(
            _LINKS[row["link"]],
            "" if rate is None else f"{rate / 1e6:.0f} Mbit/s",
            *(f"{row[f'{name}_s']:.3f} s" for name in ("floor", "sequential", "overlapped")),
            f"{row['hidden']:.0%}" if "hidden" in row else "",
        )
    Console().print(table)
    for row in line["results"]:
        typer.echo(_summary(row))


def _summary(row: dict[str, Any]) -> str:
    ratio = row["overlapped_per_sequential"]
    if "hidden" not in row:
        return f"free link, nothing to hide: an overlapped step takes {ratio:.3f} of a sequential"
    return (
        f"slow link: {row['step_bytes'] / 1e6:.0f} MB a step and direction, communication takes "
        f"{row['communication_per_computation']:.2f} of computation in a sequential step; of that "
        f"{row['hidden']:.0%} are hidden (rounds from {row['hidden_min']:.0%} to "
        f"{row['hidden_max']:.0%}), a step takes {ratio:.3f} of a sequential one"
    )
