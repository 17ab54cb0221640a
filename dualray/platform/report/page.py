"""Puts a run's record and its figures into the page's template."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import median

from dualray.platform.metrics import RunMetrics
from dualray.platform.readable import number
from dualray.platform.report import curves, experts, html, timeline
from dualray.platform.report.header import facts, tiles
from dualray.platform.report.migrations import evenness
from dualray.platform.report.modes import modes_section
from dualray.platform.report.record import RunRecord, read_run


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Render the report of a run's folder and return where it was written.

    `out` defaults to `report.html` in the folder; the file is replaced as a whole. Raises
    RunError if the folder is not a run's or `out` cannot be written.
    """
    target = out if out is not None else run_dir / "report.html"
    run = read_run(run_dir)
    html.check_target(target, "report.html")
    html.write(target, render(run))
    return target


def render(run: RunRecord) -> str:
    """The page: HTML that refers to nothing outside itself."""
    return html.page(
        heading="dualray training report",
        name=run.name,
        facts=facts(run),
        tiles=tiles(run.metrics),
        sections=[text for text in _sections(run) if text],
    )


def _sections(run: RunRecord) -> Iterator[str]:
    steps, metrics = run.metrics.steps, run.metrics
    if not steps:
        yield '<p class="empty">This run has not finished a step yet, so there are no curves.</p>'
    else:
        yield _learning(metrics)
        yield html.section(
            "Optimizer",
            html.figure(
                curves.optimizer_figure(steps, metrics.phases),
                "The learning rate that each step used, and the global norm of the gradients "
                "before clipping: spikes there are steps on which training was close to unstable.",
            ),
        )
    yield _experts(run)
    if run.trace is not None and timeline.step_spans(run.trace):
        yield _pipeline(run)
    if steps:
        yield _speed(run)
    yield modes_section(metrics)
    if run.run_yaml:
        yield html.section("Configuration", f"<pre>{escape(run.run_yaml.rstrip())}</pre>")


def _learning(metrics: RunMetrics) -> str:
    steps = metrics.steps
    caption = "Cross-entropy per token; pale lines are single steps, strong ones running means."
    if any(step.mtp_loss for step in steps):
        caption += (
            " Each multi-token-prediction depth guesses one token further ahead, from one token"
            " more and through one layer more, so its loss may lie on either side."
        )
    if metrics.phases:
        caption += " Dotted lines mark where training went on with longer sequences."
    body = html.figure(curves.loss_figure(steps, metrics.phases), caption)
    if curves.heldout_points(steps):
        caption = "How many bits the model needs for a byte of text that it never trained on."
        if metrics.yardsticks is not None:
            caption += (
                " The dashed lines are what two compressors, and unigram and bigram models over"
                " the same tokens, need for the same text: below a line is better than it."
            )
        figure = curves.bits_per_byte_figure(steps, metrics.yardsticks, metrics.phases)
        body += html.figure(figure, caption)
    return html.section("Learning", body)


def _experts(run: RunRecord) -> str:
    """Empty for a run without experts."""
    steps, loads, body = run.metrics.steps, run.loads, ""
    if loads is not None:
        shown, total = experts.layers_shown(loads)
        caption = (
            "Tokens that each expert received, relative to the layer's mean: blue experts idle, "
            "orange ones are overloaded, and a balanced layer fades into the background."
        )
        if len(shown) < total:
            caption += f" {len(shown)} of {total} mixture-of-experts layers are shown."
        body += html.figure(experts.loads_figure(loads), caption)
        if experts.has_places(loads):
            body += html.figure(
                experts.places_figure(loads),
                "Tokens that the experts of each place computed, relative to the mean of the "
                "places that hold the layer and averaged over the layers: what is orange keeps "
                "the others waiting.",
            )
    body += evenness(steps, run.metrics.migrations)
    if any(step.max_vio is not None for step in steps):
        caption = (
            "MaxVio is how far the busiest expert of a layer lies above the mean: 0 is perfect "
            "balance, 1 means that one expert got twice its share."
        )
        if any(step.max_vio_run is not None for step in steps):
            caption += " Over all steps so far what varies from step to step evens out."
        body += html.figure(experts.max_vio_figure(steps), caption)
    return html.section("Experts", body) if body else ""


def _pipeline(run: RunRecord) -> str:
    trace = run.trace
    assert trace is not None
    when = "one step" if trace.step is None else f"step {trace.step:,}"
    caption = (
        f"What every worker did during {when}, as measured; a label such as F0.3 is the forward "
        "of micro-batch 3 in direction 0, and pale parts and gaps are time spent waiting."
    )
    bubble, simulated = trace.bubble(), trace.bubble_simulated()
    if bubble is not None:
        caption += (
            " Between the first and the last computation the workers stood idle for "
            f"{100 * bubble:.1f} % of the time."
        )
    if simulated is not None:
        caption += (
            " Below it the same schedule as simulated with what its actions cost in this step: "
            f"there {100 * simulated:.1f} % are idle."
        )
    left_out = len(timeline.step_spans(trace)) - timeline.MAX_SPANS
    if left_out > 0:
        caption += f" The last {left_out:,} spans are left out; trace.json holds them all."
    body = html.figure(timeline.timeline_figure(trace, run.layout), caption)
    body += '<p class="aside">To zoom, open <code>trace.json</code> in Perfetto.</p>'
    return html.section("Pipeline", body)


def _speed(run: RunRecord) -> str:
    metrics = run.metrics
    caption = (
        "Tokens per second over all workers, and the part of each step in which the pipeline "
        "stood idle."
    )
    exposed = [step.exposed_communication for step in metrics.steps]
    if any(exposed):
        caption += (
            f" In the median step {100 * median(exposed):.1f} % of the same time went into waiting "
            "for expert ranks with nothing to compute."
        )
    if metrics.checkpoints:
        caption += " Triangles mark checkpoints."
    figure = curves.speed_figure(metrics.steps, metrics.checkpoints, metrics.phases)
    body = html.figure(figure, caption)
    return html.section("Speed and checkpoints", body + _checkpoints(run))


def _checkpoints(run: RunRecord) -> str:
    saved = run.metrics.checkpoints
    if not saved:
        return ""
    rows = "".join(
        f"<tr><td>{item.step:,}</td><td>{number(item.seconds, 2)}</td>"
        f"<td>{'yes' if f'step-{item.step}' in run.kept_checkpoints else 'no'}</td></tr>"
        for item in saved[-8:]
    )
    more = f"<p>The last 8 of {len(saved)} checkpoints:</p>" if len(saved) > 8 else ""
    head = "<tr><th>checkpoint at step</th><th>seconds to write</th><th>still kept</th></tr>"
    return f"{more}<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
