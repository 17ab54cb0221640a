"""`dualray plan`: how large a model is and what a token of it costs, before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from dualray.errors import ConfigError
from dualray.platform.planner import Plan
from dualray.platform.planning.hardware import Cluster, parse_cluster


def plan(
    model_or_run: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="a preset or a run file")
    ],
    cluster: Annotated[
        str | None,
        typer.Option(metavar="PROFILExGPUS", help="plan its training, for example on h800x2048"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="draw how training scales from 256 to 16384 GPUs"),
    ] = None,
) -> None:
    """Show a model's parameters, memory and FLOPs, or with --cluster what training it takes."""
    # Counting on the meta device needs torch, 1.6 s that no other command should pay.
    from dualray.model.count import count_parameters
    from dualray.model.formulas import parameter_count

    # What is wrong with a word is said before anything is computed.
    if plot is not None:
        _check_plot(plot, cluster)
    on = None if cluster is None else parse_cluster(cluster)
    made = find_plan(model_or_run)
    counted = count_parameters(made.model)
    by_formula = parameter_count(made.model)
    assert counted == by_formula, f"the model has {counted} and the formulas give {by_formula}"
    if on is not None:
        _plan_cluster(made, model_or_run, on, as_json, plot)
    elif as_json:
        typer.echo(json.dumps(as_dict(made)))
    else:
        for line in lines(made):
            typer.echo(line)


def _check_plot(plot: Path, cluster: str | None) -> None:
    if cluster is None:
        raise ConfigError(
            f"--plot is {plot} and there is no --cluster whose scale could be drawn",
            hint="add, say, --cluster h800x2048",
        )
    if plot.suffix != ".svg":
        raise ConfigError(
            f"--plot is {plot} and must end in .svg", hint=f"try {plot.with_suffix('.svg')}"
        )


def _plan_cluster(
    made: Plan, model_or_run: str, cluster: Cluster, as_json: bool, plot: Path | None
) -> None:
    from dualray.platform.commands import plan_cluster
    from dualray.platform.planning.cluster_plan import (
        make_cluster_plan,
        preset_setting,
        run_setting,
    )
    from dualray.platform.preset import preset_names
    from dualray.platform.run_file import load_run_file

    if model_or_run in preset_names():
        run, setting = None, preset_setting(made.name, made.model, cluster)
    else:
        run = load_run_file(model_or_run)
        setting = run_setting(run, cluster)
    planned = make_cluster_plan(setting, run)
    if plot is not None:
        # matplotlib takes a third of a second to import.
        from dualray.platform.planning.picture import write_picture
        from dualray.platform.planning.scale import make_scale

        write_picture(setting, make_scale(setting), plot)
    if as_json:
        typer.echo(json.dumps(as_dict(made) | plan_cluster.as_dict(planned)))
        return
    for line in plan_cluster.lines(planned, shutil.get_terminal_size((100, 24)).columns):
        typer.echo(line)
    if plot is not None:
        typer.echo(f"scale curves written to {plot}")


def find_plan(model_or_run: str) -> Plan:
    """The plan of a preset or of a run file's model. Raises ConfigError if it is neither."""
    from dualray.platform.planner import make_plan
    from dualray.platform.preset import closest_preset, load_model, preset_names
    from dualray.platform.run_file import load_run_file

    if model_or_run in preset_names():
        return make_plan(model_or_run, load_model(model_or_run))
    if Path(model_or_run).is_file():
        run = load_run_file(model_or_run)
        return make_plan(run.name, run.model, run.train.seq_len)
    close = closest_preset(model_or_run)
    raise ConfigError(
        f"MODEL_OR_RUN is {model_or_run} and must be a preset ({', '.join(preset_names())}) or a "
        "run file that exists",
        hint=f"did you mean {close}?" if close else "name a preset or check the path",
    )


def as_dict(made: Plan) -> dict[str, Any]:
    """The object that `--json` prints; figures by unit and name, each with its formula."""
    from dualray.model.formulas import cache_bytes_per_token, parameter_count

    count = parameter_count(made.model)
    return {
        "name": made.name,
        "attention": made.model.attention,
        "seq_len": made.seq_len,
        "contexts": list(made.contexts),
        "total_parameters": count.total,
        "active_parameters": count.active,
        "mtp_parameters": count.mtp,
        "cache_bytes_per_token": cache_bytes_per_token(made.model),
        "figures": {
            unit: {
                figure.name: {"value": figure.value, "formula": figure.formula} for figure in group
            }
            for unit, group in made.groups.items()
        },
        # The command ends with an error where they differ.
        "meta_device_agrees": True,
    }


def lines(made: Plan) -> list[str]:
    """The table for people."""
    from dualray.platform.readable import count

    figures = made.figures
    head = f"{made.name}: {count(figures['total'].value)} parameters, "
    head += f"{count(figures['active a token'].value)} active a token"
    if "MTP" in figures:
        # The published figure of DeepSeek-V3 leaves the projections out.
        head += f", {count(figures['MTP layers'].value)} more in MTP layers"
    cache = int(figures["cache a token in BF16"].value)
    head += f"; {cache:,} bytes of cache a token in BF16"
    width = max(map(len, figures))
    shown = [head]
    for unit, group in made.groups.items():
        shown += ["", unit]
        shown += [
            f"  {figure.name:<{width}}  {_value(figure.value, unit):>7}  {figure.formula}"
            for figure in group
        ]
    shown += [
        "",
        "Active is what a token is multiplied with: the chosen experts, and not the embedding,",
        "which is looked up. FLOPs are those of matrix products, a multiply-add is two.",
        f"The model built on the meta device has the same {int(figures['total'].value):,} "
        "parameters.",
    ]
    return shown


def _value(value: float, unit: str) -> str:
    from dualray.platform.readable import count

    if unit == "bytes":
        return f"{value:,.0f}" if value < 1e6 else f"{count(value)}B"
    return count(value)
