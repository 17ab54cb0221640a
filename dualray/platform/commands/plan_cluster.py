"""What `dualray plan --cluster` prints: JSON for programs, tables for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dualray.model.formulas import parameter_count
from dualray.platform.planning import published
from dualray.platform.planning.assumptions import assumptions
from dualray.platform.planning.cluster_plan import ClusterPlan, Named
from dualray.platform.planning.estimate import Estimate
from dualray.platform.planning.explain import explain
from dualray.platform.readable import count

HEAD = "   pipe experts replicas schedule    micro step s bubble  GB tok/s kh/T k$/T"


def as_dict(made: ClusterPlan) -> dict[str, Any]:
    """The object that `--json` prints besides the model's figures; units end the names."""
    setting, parameters = made.setting, parameter_count(made.setting.model)
    hardware = setting.cluster.hardware
    explained = explained_layout(made)
    return {
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "cluster": setting.cluster.spec,
        "hardware": asdict(hardware),
        "precision": setting.precision.name,
        "sequences_per_step": setting.num_sequences,
        "tokens_per_step": setting.tokens_per_step,
        "layouts_possible": made.ranking.num_possible,
        "layouts_fitting": made.ranking.num_fitting,
        "layouts": [layout_dict(each) for each in made.layouts],
        **_named_dict("report_layout", made.report),
        **({} if made.run is None else _named_dict("run_layout", made.run)),
        "published": [asdict(each) | {"deviation": each.deviation} for each in _comparisons(made)],
        "layout_figures": {
            unit: {each.name: {"value": each.value, "formula": each.formula} for each in group}
            for unit, group in explain(setting, explained).items()
        },
        "assumptions": assumptions(setting),
    }


def layout_dict(estimate: Estimate) -> dict[str, Any]:
    """One layout; seconds are of a step, and means over the pipeline's ranks."""
    candidate = estimate.candidate
    return {
        "pipeline": candidate.pipeline,
        "experts": candidate.experts,
        "replicas": candidate.replicas,
        "schedule": candidate.schedule,
        "micro_batches": candidate.micro_batches,
        "micro_batch_size": candidate.micro_batch_size,
        "layers_per_stage": list(candidate.layers_per_stage),
        "gpus": candidate.num_gpus,
        "step_seconds": estimate.step_s,
        "bubble_fraction": estimate.bubble_fraction,
        "bubble_seconds": estimate.bubble_s,
        "phases_seconds": estimate.phases_s,
        "optimizer_seconds": estimate.fit.optimizer_s,
        "communication_exposed_seconds": estimate.exposed_s,
        "communication_hidden_seconds": estimate.hidden_s,
        "tokens_per_second_per_gpu": estimate.tokens_per_s_per_gpu,
        "model_flops_utilization": estimate.utilization,
        "gpu_hours_per_trillion_tokens": estimate.gpu_hours_per_trillion,
        "days_per_trillion_tokens": estimate.days_per_trillion,
        "dollars_per_trillion_tokens": estimate.dollars_per_trillion,
        "memory_per_gpu_bytes": estimate.memory.total,
        "memory_by_kind_bytes": asdict(estimate.memory),
    }


def explained_layout(made: ClusterPlan) -> Estimate:
    """The layout whose figures are shown one by one: the run's, the report's or the fastest."""
    for named in (made.run, made.report):
        if named is not None and named.estimate is not None:
            return named.estimate
    return made.layouts[0]


def lines(made: ClusterPlan, width: int) -> list[str]:
    """The tables for people, in `width` columns or a few more."""
    return [
        line
        for section in (
            _head(made),
            _layouts(made),
            _beside_published(made),
            _figures(made, width),
            _assumed(made, width),
            _next(made),
        )
        for line in section
    ]


def _named_dict(key: str, named: Named) -> dict[str, Any]:
    found = None if named.estimate is None else layout_dict(named.estimate)
    return {key: found, f"{key}_reason": named.reason}


def _comparisons(made: ClusterPlan) -> tuple[published.Comparison, ...]:
    report = made.report.estimate
    if report is None or not published.is_published(made.setting, report):
        return ()
    return published.compare(report)


def _head(made: ClusterPlan) -> Iterator[str]:
    setting, parameters = made.setting, parameter_count(made.setting.model)
    yield (
        f"{setting.name} on {setting.cluster.num_gpus} x {setting.cluster.hardware.title}: "
        f"{count(parameters.total)} parameters, {count(parameters.active)} active"
    )
    yield (
        f"in {setting.precision.name}, {setting.num_sequences} x {setting.seq_len} = "
        f"{count(setting.tokens_per_step)} tokens a step"
    )


def _layouts(made: ClusterPlan) -> Iterator[str]:
    ranking = made.ranking
    yield ""
    yield f"fastest layouts ({ranking.num_fitting} of {ranking.num_possible} fit into memory)"
    yield HEAD
    for estimate in made.layouts:
        candidate = estimate.candidate
        batches = f"{candidate.micro_batches}x{candidate.micro_batch_size}"
        yield (
            f"{_mark(made, estimate):>2}{candidate.pipeline:>5}{candidate.experts:>8}"
            f"{candidate.replicas:>9} {candidate.schedule:<9}{batches:>8}{_step(estimate):>7}"
            f"{estimate.bubble_fraction:>7.1%}{estimate.memory.total / 1e9:>4.0f}"
            f"{_rate(estimate):>6}{estimate.gpu_hours_per_trillion / 1e3:>5.0f}"
            f"{estimate.dollars_per_trillion / 1e3:>5.0f}"
        )
    yield "  micro-batches x sequences; seconds a step; GB on the fullest GPU;"
    yield "  tokens/s a GPU; thousands of GPU hours and of dollars a trillion tokens"
    for mark, name, named in (("*", "report", made.report), ("+", "run file", made.run)):
        if named is None:
            continue
        yield f"  {mark} the {name}'s layout" + (
            "" if named.reason is None else f": none, {named.reason}"
        )


def _step(estimate: Estimate) -> str:
    return f"{estimate.step_s:.4g}" if estimate.step_s >= 1 else f"{estimate.step_s:.2g}"


def _rate(estimate: Estimate) -> str:
    rate = estimate.tokens_per_s_per_gpu
    return count(rate) if rate >= 100_000 else f"{rate:.0f}"


def _mark(made: ClusterPlan, estimate: Estimate) -> str:
    if made.run is not None and made.run.estimate == estimate:
        return "+"
    return "*" if made.report.estimate == estimate else " "


def _beside_published(made: ClusterPlan) -> Iterator[str]:
    comparisons = _comparisons(made)
    if not comparisons:
        return
    yield ""
    title = "the report's layout"
    yield f"{title:<34}  {'ours':>9}  published"
    for each in comparisons:
        digits = 0 if each.published >= 1000 else 2
        yield (
            f"  {each.name:<32}  {each.ours:>9,.{digits}f}  {each.published:>9,.{digits}f}"
            f"  {each.unit:<1}  {each.deviation:+.1%}"
        )


def _figures(made: ClusterPlan, width: int) -> Iterator[str]:
    estimate = explained_layout(made)
    candidate = estimate.candidate
    yield ""
    yield (
        f"{candidate.schedule}, pipeline {candidate.pipeline} x experts {candidate.experts} x "
        f"replicas {candidate.replicas}, figure by figure"
    )
    yield f"layers of the stages: {_runs(candidate.layers_per_stage)}"
    yield (
        f"communication of a step: {estimate.exposed_s:.2f} s exposed, "
        f"{estimate.hidden_s:.2f} s hidden behind computation"
    )
    for unit, group in explain(made.setting, estimate).items():
        yield ""
        yield unit
        for figure in group:
            start = f"  {figure.name:<20}  {_value(figure.value, unit):>8}  "
            yield from textwrap.wrap(
                figure.formula, width, initial_indent=start, subsequent_indent=" " * len(start)
            )


def _value(value: float, unit: str) -> str:
    if unit.startswith("seconds"):
        return f"{value:.4f}"
    if unit.startswith("bytes"):
        return f"{value / 1e9:.2f} GB"
    return count(value) if value >= 10_000 else f"{value:.0f}"


def _runs(layers: tuple[int, ...]) -> str:
    """Equal neighbours together: 15 x 4, 1."""
    runs: list[tuple[int, int]] = []
    for each in layers:
        number = runs.pop()[0] if runs and runs[-1][1] == each else 0
        runs.append((number + 1, each))
    return ", ".join(f"{number} x {each}" if number > 1 else f"{each}" for number, each in runs)


def _assumed(made: ClusterPlan, width: int) -> Iterator[str]:
    yield ""
    yield "assumed"
    for name, text in assumptions(made.setting).items():
        yield from textwrap.wrap(
            f"{name}: {text}", width, initial_indent="  ", subsequent_indent="    "
        )


def _next(made: ClusterPlan) -> Iterator[str]:
    candidate = explained_layout(made).candidate
    yield ""
    yield "Step and bubble are simulated; see the schedule with"
    yield (
        f"dualray schedule {candidate.schedule} --ranks {candidate.pipeline} "
        f"--chunks {candidate.micro_batches}"
    )
