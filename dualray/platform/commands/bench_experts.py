"""`dualray bench experts`: the routed experts of a layer beside Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver


def experts(
    quick: Annotated[
        bool, typer.Option("--quick", help="a small layer, in seconds; says little")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Dispatch, experts and combine, forward and backward, against Hugging Face's DeepseekV3.

    fp32 and bf16, one and two threads; where there is a GPU also against naive permutes around
    grouped_mm. Some 2 minutes.
    """
    # torch and transformers take seconds to import, which no other command should pay.
    from dualray.platform.bench import experts as bench
    from dualray.platform.bench.hugging_face import import_transformers
    from dualray.platform.bench.record import check_target, new_record

    check_target(record)
    import_transformers("bench experts")
    workload = bench.QUICK if quick else bench.FULL
    with Console(stderr=True).status("") as status:
        results = bench.compare_experts(workload, on_case=status.update)
    line = new_record("experts", bench.config_dict(workload), results)
    deliver(line, record, _show, as_json=as_json)


def _show(line: dict[str, Any]) -> None:
    machine, config, versions = line["machine"], line["config"], line["versions"]
    typer.echo(
        f"experts, {machine['cpu']}, {machine['cores']} cores; {config['tokens']} tokens, "
        f"{config['num_experts_per_tok']} of {config['n_routed_experts']} experts, "
        f"{config['hidden_size']} and {config['moe_intermediate_size']} wide; torch "
        f"{versions['torch']}, transformers {versions['transformers']}"
    )
    table = Table("case", "dualray", "HF", "ratio", "range", "of bare", "around", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in line["results"]:
        table.add_row(
            _case(row),
            *(f"{row[f'{name}_s'] * 1e3:.1f}" for name in ("dualray", "hugging_face")),
            f"{row['ratio']:.2f}x",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            f"{row['dualray_per_bare']:.2f}, {row['hugging_face_per_bare']:.2f}",
            f"{row['bookkeeping']:.0%}",
        )
    Console().print(table)
    typer.echo(
        "times in ms. ratio: how many times faster dualray is, the median over rounds. fresh: "
        "choices of its own for every round, as steps of a training have. of bare: both, per time "
        "of the grouped products alone. around: what of dualray's time is not the experts' "
        "products and SwiGLU"
    )
    typer.echo(_gpu(line))


def _case(row: dict[str, Any]) -> str:
    place = "GPU" if row["device"] == "cuda" else f"{row['threads']} threads"
    if row["device"] == "cpu" and row["threads"] == 1:
        place = "1 thread"
    return f"{row['dtype']} {place} {row['routing']}"


def _gpu(line: dict[str, Any]) -> str:
    if line["config"]["gpu"] is None:
        return "no GPU here: the comparison with naive permutes around grouped_mm did not run"
    naive = ", ".join(
        f"{row['ratio_to_naive']:.2f}x in {row['dtype']} with {row['routing']} routing"
        for row in line["results"]
        if "ratio_to_naive" in row
    )
    return f"{line['config']['gpu']}, against naive permutes around grouped_mm: {naive}"
