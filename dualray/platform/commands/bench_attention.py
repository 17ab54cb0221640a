"""`dualray bench attention`: MHA, GQA, MQA and MLA at the same size on the same text."""

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

VOCABULARY = "bpe:2048"


def attention(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="token shards; by default Shakespeare is fetched and cut into 2048"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small models, in seconds")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="write the result as a page with plots")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Loss, cache and decoding speed of four attentions with the same parameters and data.

    Trains all four for some 9 minutes on two cores.
    """
    # torch takes seconds to import, which no other command should pay.
    from dualray.data.dataset import TokenDataset
    from dualray.platform.bench.attention import FULL, QUICK
    from dualray.platform.bench.attention_page import render
    from dualray.platform.bench.attention_result import compare_attentions, config_dict
    from dualray.platform.bench.record import check_target, new_record
    from dualray.platform.report import html

    check_target(record)
    if out is not None:
        html.check_target(out, "attention.html")
    workload = QUICK if quick else FULL
    with ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True).status("reading the corpus"))
        folder = data if data is not None else _shakespeare(stack, status.update)
        dataset = TokenDataset.open(folder, verify=False)
        rows = compare_attentions(workload, dataset, on_part=status.update)
        config = config_dict(workload, dataset, "shakespeare" if data is None else str(data))
    line = new_record("attention", config, rows)
    if out is not None:
        html.write(out, render(line))
    deliver(line, record, _show, as_json=as_json)
    if out is not None and not as_json:
        typer.echo(f"page written to {out}; open it in a browser")


def _shakespeare(stack: ExitStack, say: Callable[[str], None]) -> Path:
    """Token shards of Shakespeare's works in a folder that is gone when the command ends."""
    from dualray.data.fetch import fetch
    from dualray.data.shards import build

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dualray-")))
    say("fetching Shakespeare")
    fetch("shakespeare", folder / "text")
    say("cutting it into tokens")
    build([folder / "text"], VOCABULARY, folder / "tokens")
    return folder / "tokens"


def _show(line: dict[str, Any]) -> None:
    from dualray.platform.bench.attention_page import cells

    rows, config, machine = line["results"], line["config"], line["machine"]
    speeds = [f"t/s {speed['context']}" for speed in rows[0]["decode"]]
    titles = ("kind", "parameters", "FFN", "train", "held-out", "bits/B", "cache", *speeds)
    table = Table(*titles, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*cells(row))
    typer.echo(
        f"attention, {config['lr']['steps']} steps of {config['batch_size']} x "
        f"{config['seq_len']} tokens each, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; torch {line['versions']['torch']}"
    )
    Console().print(table)
    typer.echo(
        "train and held-out: loss in nats a token; cache: bytes a token in BF16; t/s: tokens a "
        f"second of {config['decode_batch']} sequences that decode together at that context"
    )
