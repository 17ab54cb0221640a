"""`dualray bench`: side-by-side benchmarks against a peer, in one run on this machine."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_attention import attention
from dualray.platform.commands.bench_context import context

app = typer.Typer(help="Side-by-side benchmarks.", no_args_is_help=True)
app.command("attention")(attention)
app.command("context")(context)


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    both = "both"


@app.callback()
def _group() -> None:
    """Keeps `training` a word of its own while it is the only benchmark."""


@app.command("training")
def training(
    dtype: Annotated[Dtype, typer.Option(help="dtype of weights and activations")] = Dtype.both,
    pairs: Annotated[int, typer.Option(min=1, help="measured pairs of steps per dtype")] = 9,
    warmup: Annotated[int, typer.Option(min=2, help="pairs before those")] = 2,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads; by default torch's own choice")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a small shape, in seconds")] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Training tokens/s of the one-process model against Hugging Face's DeepseekV3."""
    # torch and transformers take seconds to import, which no other command should pay.
    import torch

    from dualray.platform.bench.hugging_face import import_transformers
    from dualray.platform.bench.record import append, new_record
    from dualray.platform.bench.training import FULL, QUICK, compare, config_dict

    import_transformers()
    if threads is not None:
        torch.set_num_threads(threads)
    workload = QUICK if quick else FULL
    names = ["fp32", "bf16"] if dtype is Dtype.both else [dtype.value]
    progress = Console(stderr=True)
    results = []
    for name in names:
        with progress.status(f"{name}: building both models") as status:
            comparison = compare(
                workload,
                name,
                pairs=pairs,
                warmup=warmup,
                on_pair=lambda done, name=name: status.update(
                    f"{name}: {done} of {warmup + pairs} pairs of steps"
                ),
            )
        results.append(comparison.as_dict())
    line = new_record("training", config_dict(workload, warmup=warmup), results)
    if record is not None:
        append(record, line)
    if as_json:
        typer.echo(json.dumps(line))
        return
    _show(line)
    if record is not None:
        typer.echo(f"appended to {record}")


def _show(line: dict[str, Any]) -> None:
    machine, config = line["machine"], line["config"]
    table = Table(
        "dtype", "model", "step s", "tokens/s", "ratio", "first loss", "last loss", box=None
    )
    for result in line["results"]:
        for side, title in (("dualray", "dualray"), ("hugging_face", "Hugging Face")):
            row = result[side]
            ratio = f"{result['ratio']:.2f}x" if side == "dualray" else ""
            table.add_row(
                result["dtype"],
                title,
                f"{row['median_step_s']:.3f}",
                f"{row['tokens_per_s']:,.0f}",
                ratio,
                f"{row['first_loss']:.5f}",
                f"{row['last_loss']:.5f}",
            )
    typer.echo(
        f"training, batch {config['batch_size']} x {config['seq_len']}, {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['threads']} threads; torch "
        f"{line['versions']['torch']}, transformers {line['versions']['transformers']}"
    )
    Console().print(table)
    spread = ", ".join(
        f"{r['dtype']} {r['ratio_min']:.2f} to {r['ratio_max']:.2f}" for r in line["results"]
    )
    typer.echo(f"ratio is the median over {line['results'][0]['pairs']} pairs of steps ({spread})")
