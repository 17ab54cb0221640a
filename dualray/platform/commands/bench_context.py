"""`dualray bench context`: a model before and after its context was extended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver

_TITLES = {"before": "before", "before_with_yarn": "before, with YaRN", "after": "after"}


def context(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="a checkpoint from before the extension")
    ],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="one from after it")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="token shards whose held-out text is read")
    ],
    windows: Annotated[int, typer.Option(min=1, help="windows of held-out text")] = 48,
    needles: Annotated[
        int, typer.Option(min=0, help="retrievals per length and depth; 0 for none")
    ] = 16,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Loss by position and retrieval from the context, before and after it was extended."""
    # torch takes seconds to import, which no other command should pay.
    from dualray.checkpoint.reader import Reader
    from dualray.checkpoint.store import find
    from dualray.data.dataset import TokenDataset
    from dualray.platform.bench.context import check, compare, readers_of
    from dualray.platform.bench.record import check_target, new_record

    def opened(checkpoint: Path) -> Reader:
        found = find(checkpoint)
        for message in found.messages:
            typer.echo(f"warning: {message}", err=True)
        assert found.path is not None, "find raises when there is none"
        return Reader(found.path)

    check_target(record)
    short, long = opened(before), opened(after)
    dataset = TokenDataset.open(data, verify=False)
    contexts = check(short, long, dataset)
    with Console(stderr=True).status("loading three models") as status:
        rows = compare(
            readers_of(short, long),
            dataset,
            contexts,
            windows=windows,
            needles=needles,
            on_part=status.update,
        )
    config = {
        "before": str(short.folder),
        "after": str(long.folder),
        "original": contexts.original,
        "extended": contexts.extended,
        "model": long.meta["model"],
        "data_sha256": dataset.data_sha256,
    }
    line = new_record("context", config, rows)
    deliver(line, record, _show, as_json=as_json)


def _show(line: dict[str, Any]) -> None:
    config = line["config"]
    typer.echo(
        f"{config['before']} (trained for {config['original']} tokens) and {config['after']} "
        f"({config['extended']} tokens)"
    )
    losses = [row for row in line["results"] if row["kind"] == "loss"]
    table = Table("positions", *_TITLES.values(), "lower by", box=None)
    for row in losses:
        error = row["gain_standard_error"]
        table.add_row(
            f"{row['first']} to {row['end'] - 1}",
            *(f"{row[name]:.4f}" for name in _TITLES),
            f"{row['gain']:.4f}" + ("" if error is None else f" +- {error:.4f}"),
        )
    _print(table)
    typer.echo(
        f"nats a token over {losses[0]['windows']} windows of held-out text; the last column is "
        "before minus after, with the standard error over the windows"
    )
    needles = [row for row in line["results"] if row["kind"] == "needle"]
    if not needles:
        return
    table = Table("needle in", "at", *_TITLES.values(), box=None)
    for row in needles:
        found = [row[name] for name in _TITLES]
        table.add_row(
            f"{row['length']} tokens",
            f"{row['depth']:.0%}",
            *(f"{each['gain']:+.2f} nats, {each['exact']:.0%}" for each in found),
        )
    _print(table)
    typer.echo(
        f"over {needles[0]['trials']} words each: how much more likely the hidden line makes its "
        "word, and how often it is found exactly"
    )


def _print(table: Table) -> None:
    for column in table.columns:
        column.justify = "right"
    Console().print(table)
