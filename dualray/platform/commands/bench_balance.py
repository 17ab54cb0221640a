"""`dualray bench balance`: four ways to keep experts evenly loaded, on the same text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver

CORPUS = "python-stdlib"


def balance(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="token shards; by default this Python's library is cut into 1024"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a small model, in half a minute; says little")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="write the result as a page with plots")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Loss and MaxVio with no balance, an auxiliary loss, moving biases, and both.

    Trains each with three seeds, a training a core at a time: some 10 minutes on two cores.
    """
    # torch takes seconds to import, which no other command should pay.
    from dualray.platform.bench import balance as bench
    from dualray.platform.bench.balance_page import render
    from dualray.platform.bench.balance_result import claims, compare_balance, config_dict
    from dualray.platform.bench.record import check_target, new_record
    from dualray.platform.report import html

    check_target(record)
    if out is not None:
        html.check_target(out, "balance.html")
    workload = bench.QUICK if quick else bench.FULL
    with ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True).status("reading the corpus"))
        folder = data if data is not None else _corpus(stack, workload.vocabulary, status.update)
        rows = compare_balance(workload, folder, on_part=status.update)
        config = config_dict(workload, folder, CORPUS if data is None else str(data))
    line = new_record("balance", config, rows) | {"claims": claims(rows)}
    if out is not None:
        html.write(out, render(line))
    deliver(line, record, _show, as_json=as_json)
    if out is not None and not as_json:
        typer.echo(f"page written to {out}; open it in a browser")


def _corpus(stack: ExitStack, vocabulary: str, say: Callable[[str], None]) -> Path:
    """Token shards of the standard library in a folder that is gone when the command ends."""
    from dualray.data.fetch import fetch
    from dualray.data.shards import build

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dualray-")))
    say("reading the standard library")
    fetch(CORPUS, folder / "text")
    say("cutting it into tokens")
    build([folder / "text"], vocabulary, folder / "tokens")
    return folder / "tokens"


def _show(line: dict[str, Any]) -> None:
    from dualray.platform.bench.balance_page import HEAD, cells, claim_cells

    config, machine = line["config"], line["machine"]
    train = config["train"]
    typer.echo(
        f"balance, {train['steps']} steps of {train['micro_batch_size']} x {train['seq_len']} "
        f"tokens each, {len(config['seeds'])} seeds, gamma {train['gamma']:g}, auxiliary loss "
        f"{config['aux_alpha']:g}; {machine['cpu']}, {machine['cores']} cores; torch "
        f"{line['versions']['torch']}"
    )
    table = Table(*HEAD, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in line["results"]:
        table.add_row(*cells(row))
    Console().print(table)
    for claim in line["claims"]:
        words, by_seed, mean, verdict = claim_cells(claim)
        typer.echo(f"{words}: {verdict}; {mean}, by seed {by_seed}")
