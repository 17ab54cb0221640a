"""`dualray bench model`: training, decoding and memory beside Hugging Face's DeepseekV3."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    both = "both"


def model(
    dtype: Annotated[Dtype, typer.Option(help="dtype of weights and activations")] = Dtype.both,
    pairs: Annotated[int, typer.Option(min=1, help="measured pairs of steps")] = 9,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads; by default torch's own choice")
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="also compile a decode step, which takes a minute a dtype")
    ] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="small shapes, in seconds; nothing is compiled")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Speed and memory of the one-process model against Hugging Face's DeepseekV3.

    Some 10 minutes on two cores.
    """
    # torch and transformers take seconds to import, which no other command should pay.
    import torch

    from dualray.platform.bench import model as bench
    from dualray.platform.bench.hugging_face import import_transformers
    from dualray.platform.bench.record import check_target, new_record

    check_target(record)
    import_transformers()
    if threads is not None:
        torch.set_num_threads(threads)
    size = bench.QUICK if quick else bench.FULL
    names = ["fp32", "bf16"] if dtype is Dtype.both else [dtype.value]
    rows: list[dict[str, Any]] = []
    with Console(stderr=True).status("") as status:
        for name in names:
            rows += bench.compare_model(
                size,
                name,
                pairs=pairs,
                compiled=compiled and not quick,
                on_part=lambda text, name=name: status.update(f"{name}: {text}"),
            )
    line = new_record("model", bench.config_dict(size), rows)
    deliver(line, record, _show, as_json=as_json)


def _show(line: dict[str, Any]) -> None:
    machine, config = line["machine"], line["config"]
    table = Table("dtype", "what", "dualray", "Hugging Face", "ratio", "from .. to", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in line["results"]:
        unit = "peak_bytes" if row["part"] == "memory" else "tokens_per_s"
        ours, theirs = (_amount(row[side][unit], unit) for side in ("dualray", "hugging_face"))
        spread = f"{row['ratio_min']:.2f} .. {row['ratio_max']:.2f}" if "ratio_min" in row else ""
        what = _what(row, config)
        table.add_row(row["dtype"], what, ours, theirs, f"{row['ratio']:.2f}x", spread)
    typer.echo(
        f"model, {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; torch "
        f"{line['versions']['torch']}, transformers {line['versions']['transformers']}"
    )
    Console().print(table)
    typer.echo(
        "ratio: how many times faster, or smaller, dualray is; of speeds the median over pairs of "
        "steps made in turn; Hugging Face's steps are never compiled"
    )


def _amount(value: float, unit: str) -> str:
    return f"{value / 1e6:,.0f} MB" if unit == "peak_bytes" else f"{value:,.0f} tokens/s"


def _what(row: dict[str, Any], config: dict[str, Any]) -> str:
    if row["part"] == "decode":
        compiled = ", compiled" if row["compiled"] else ""
        return f"decode {row['batch']} at context {row['context']}{compiled}"
    batch = f"{config['batch_size']} x {config['seq_len']}"
    return {"training": f"training, {batch}", "memory": f"memory of a step, {batch}"}[row["part"]]
