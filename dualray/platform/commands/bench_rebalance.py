"""`dualray bench rebalance`: experts of skewed routers moved among workers that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver


def rebalance(
    quick: Annotated[
        bool, typer.Option("--quick", help="a small model, in half a minute; says little")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Skewed routers: the slowest worker before and after the balancer has moved experts.

    Four processes train a small model with and without redundant copies, then with a worker of
    half the speed. Some 2 minutes on two cores.
    """
    # torch takes seconds to import, which no other command should pay.
    from dualray.platform.bench import rebalance as bench
    from dualray.platform.bench.rebalance_result import compare_rebalance, goals
    from dualray.platform.bench.record import check_target, new_record

    check_target(record)
    case = bench.QUICK if quick else bench.FULL
    with Console(stderr=True).status("") as status:
        found = compare_rebalance(case, on_part=status.update)
    line = new_record("rebalance", bench.config_dict(case), found.rows) | {
        "migrations": found.migrations,
        "goals": goals(found),
        "load_average": found.load_average,
    }
    deliver(line, record, _show, as_json=as_json)


def _show(line: dict[str, Any]) -> None:
    from dualray.platform.bench.rebalance_result import WORDS

    machine, config = line["machine"], line["config"]
    typer.echo(
        f"rebalance, {machine['cpu']}, {machine['cores']} cores; {config['expert_ranks']} workers "
        f"of one thread, {config['n_routed_experts']} experts and {config['redundant']} redundant "
        f"copies, {config['rows']} rows a layer and step; torch {line['versions']['torch']}"
    )
    table = Table("experts", "rows", "slowest", "mean", "even", "wall", "step", box=None)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in line["results"]:
        names = ("slowest_s", "mean_s", "even_s", "slowest_wall_s", "step_s")
        table.add_row(
            WORDS[row["setting"]],
            f"{row['imbalance']:.2f}",
            *(f"{row[name] * 1e3:.0f} ms" for name in names),
        )
    Console().print(table)
    typer.echo(
        "rows: of the fullest rank over the mean, worst layer; slowest: what the slowest worker of "
        "each layer computes in forwards of routed experts, and wall: how long that takes; even: "
        "the same if all ranks ended together"
    )
    if machine["cores"] < config["expert_ranks"]:
        typer.echo(
            f"{config['expert_ranks']} workers share {machine['cores']} cores, and one that waits "
            "leaves its core to the slowest: wall and step times gain less than with a core for "
            "each, and the balancer is told what threads computed"
        )
    for migration in line["migrations"]:
        typer.echo(f"{WORDS[migration['setting']]}: {_migration(migration)}")
    for goal in line["goals"]:
        typer.echo(f"{'met' if goal['met'] else 'MISSED'}: {goal['said']}")
    typer.echo(f"load average before: {line['load_average']:.1f}")


def _migration(found: dict[str, Any]) -> str:
    text = f"moved in {found['adopted']} of {found['looks']} looks ({found['reasons'][0]})"
    if not found["adopted"]:
        return text
    return (
        f"{text}; {found['moves']:.0f} moves, {found['bytes'] / 1e6:.0f} MB in "
        f"{found['seconds']:.2g} s, foreseen {found['foreseen_cost_s']:.2g} s; gained "
        f"{found['measured_gain_s']:.2g} s a step in all passes, foreseen "
        f"{found['foreseen_gain_s']:.2g} s"
    )
