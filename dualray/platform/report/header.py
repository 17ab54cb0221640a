"""The top of the page: what the run was, and the numbers that a reader looks for first."""

from __future__ import annotations

from html import escape
from statistics import median

from dualray.platform.metrics import RunMetrics
from dualray.platform.readable import count, duration, number
from dualray.platform.report.record import RunRecord


def facts(run: RunRecord) -> str:
    """What the run was, as a list of term and description."""
    rows: list[tuple[str, str]] = []
    model = _model(run)
    if model:
        rows.append(("Model", model))
    layout = run.layout
    if layout is not None:
        grid = f"{layout.pipeline} pipeline x {layout.experts} expert ranks"
        if layout.replicas > 1:
            grid += f" x {layout.replicas} replicas"
        alone = layout.world_size == 1
        schedule = layout.schedule
        if run.metrics.decisions:
            decided = run.metrics.decisions[-1]
            schedule += f", {decided.schedule} since step {decided.step:,}"
        text = "one worker" if alone else f"{grid}, {schedule}: {layout.world_size} workers"
        rows.append(("Layout", text))
    corpus = run.state.get("corpus") or run.section("data").get("path")
    if corpus:
        rows.append(("Corpus", str(corpus)))
    steps = run.metrics.steps
    if steps:
        planned = _planned_steps(run)
        done = f"{steps[-1].step:,}"
        if planned > steps[-1].step:
            done += f" of {planned:,}"
        rows.append(("Steps", f"{done} ({count(steps[-1].tokens)} tokens)"))
        rows.append(("Duration", _duration(run.metrics)))
    if run.state.get("state"):
        rows.append(("State", str(run.state["state"])))
    return "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in rows)


def _planned_steps(run: RunRecord) -> int:
    """Of section `train` and of the phases behind it; 0 if the run file does not say."""
    phases = run.section("extend").get("phases")
    sections = [run.section("train"), *(phases if isinstance(phases, list) else [])]
    steps = [section.get("steps") for section in sections if isinstance(section, dict)]
    return sum(number for number in steps if isinstance(number, int))


def _model(run: RunRecord) -> str:
    model = run.config.get("model")
    if isinstance(model, str):
        text = model
    elif isinstance(model, dict):
        named = {
            "num_hidden_layers": "layers",
            "hidden_size": "wide",
            "n_routed_experts": "routed experts",
        }
        text = ", ".join(f"{model[key]} {word}" for key, word in named.items() if key in model)
        preset = model.get("preset")
        text = f"{preset} ({text})" if preset and text else str(preset or text)
    else:
        text = ""
    total, active = (run.state.get(key) for key in ("num_parameters", "num_active_parameters"))
    if isinstance(total, int):
        size = f"{count(total)} parameters"
        if isinstance(active, int) and active != total:
            size += f", {count(active)} active per token"
        text = f"{text}: {size}" if text else size
    return text


def _duration(metrics: RunMetrics) -> str:
    training = sum(step.step_time_s for step in metrics.steps)
    saving = sum(saved.seconds for saved in metrics.checkpoints)
    text = f"{duration(training)} of steps"
    return f"{text}, {duration(saving)} of checkpoints" if round(saving) else text


def tiles(metrics: RunMetrics) -> str:
    """The handful of numbers that a reader looks for first."""
    rows: list[tuple[str, str, str]] = []
    steps = metrics.steps
    if steps:
        rows.append(("Training loss", number(steps[-1].loss, 4), "nats per token, last step"))
        heldout = [s for s in steps if s.heldout_bits_per_byte is not None]
        if heldout:
            value = number(heldout[-1].heldout_bits_per_byte or 0.0, 3)
            rows.append(("Held-out", value, "bits per byte, last evaluation"))
        rows.append(
            ("Throughput", count(median(s.tokens_per_s for s in steps)), "tokens/s, median step")
        )
        if any(s.bubble for s in steps):
            bubble = 100 * median(s.bubble for s in steps)
            rows.append(("Bubble", f"{bubble:.1f} %", "pipeline idle, median step"))
        if steps[-1].max_vio is not None:
            rows.append(("MaxVio", number(steps[-1].max_vio, 2), "expert imbalance, last step"))
    if metrics.switch is not None:
        seconds = number(metrics.switch.seconds_to_first_token, 2)
        rows.append(("Train to serve", f"{seconds} s", "last step to first token"))
    return "".join(
        f'<div class="tile"><span>{title}</span><b>{escape(value)}</b><small>{what}</small></div>'
        for title, value, what in rows
    )
