"""The report: one page that stands alone, shows the measured numbers and does without parts."""

import dataclasses
import math
import re

import numpy as np
import pytest
from report_pages import bare_run, page_of
from synthetic_run import LAYERS, MOVED, RUN_YAML, make_run, make_spans, make_steps, make_trace

from dualray.parallel.layout import Layout
from dualray.platform.metrics import BackToTraining, Decided, Paused, Switch
from dualray.platform.metrics_log import MetricsLog, read_metrics
from dualray.platform.readable import count
from dualray.platform.report.style import VARIABLES, smooth, thin
from dualray.platform.report.timeline import timeline_figure
from dualray.platform.trace import Category, Span, Trace, write_trace


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run_dir):
    return page_of(run_dir)


def test_page_has_a_section_for_every_part(page):
    assert page.headings == [
        "Learning",
        "Optimizer",
        "Experts",
        "Pipeline",
        "Speed and checkpoints",
        "From trainer to server",
        "Configuration",
    ]
    assert page.tags.count("svg") == 9
    assert page.tags.count("figure") == page.tags.count("figcaption") == 9
    assert all(caption.endswith(".") for caption in page.captions)


def test_page_loads_nothing(page, run_dir):
    text = (run_dir / "report.html").read_text()
    namespaces = re.findall(r'xmlns(?::\w+)?="([^"]*)"', text)
    assert len(re.findall(r"https?://", text)) == len(namespaces)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    targets = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href")]
    assert targets
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_references_resolve(page, run_dir):
    assert len(page.ids) == len(set(page.ids))
    text = (run_dir / "report.html").read_text()
    references = re.findall(r'(?:href="#|url\(#)([^")]*)', text)
    assert references
    assert set(references) <= set(page.ids)


def test_figures_use_the_palette_of_the_page(run_dir):
    text = (run_dir / "report.html").read_text()
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    for stand_in, variable in VARIABLES.items():
        assert stand_in not in figures
        assert f"{variable}:" in text
    assert "var(--blue)" in figures
    assert "DejaVu" not in figures


def test_tiles_show_the_measured_numbers(page, run_dir):
    metrics = read_metrics(run_dir / "metrics.jsonl")
    last = metrics.steps[-1]
    bubbles = sorted(step.bubble for step in metrics.steps)
    speeds = sorted(step.tokens_per_s for step in metrics.steps)
    assert page.tiles == {
        "Training loss": f"{last.loss:.4f}",
        "Held-out": f"{last.heldout_bits_per_byte:.3f}",
        "Throughput": count((speeds[299] + speeds[300]) / 2),
        "Bubble": f"{50 * (bubbles[299] + bubbles[300]):.1f} %",
        "MaxVio": f"{last.max_vio:.2f}",
        "Train to serve": "0.83 s",
    }


def test_text_states_run_layout_yardsticks_and_checkpoints(page):
    words = " | ".join(page.words)
    for expected in (
        "Model | tiny: 3.41M parameters, 1.32M active per token",
        "Layout | 2 pipeline x 2 expert ranks, dualpipe: 4 workers",
        "Corpus | data/shakespeare (5.5 MB)",
        "Steps | 600 (9.83M tokens)",
        "gzip -9 3.089",
        "bzip2 -9 2.441",
        "unigram 2.913",
        "bigram 2.258",
        "200 | 0.95 | no | 400 | 1.15 | yes | 600 | 1.35 | yes",
        "0 | 4101 | 4101 | 1 | 4102 | 4102",
        "The first token was served 0.83 s after the last optimizer step. "
        "The processes that trained are the processes that serve.",
        "worker 3 (pipeline 1, expert 1)",
        "layer 1",
        "load of every node",
        "10.0.0.2",
        "worst layer, all steps so far",
    ):
        assert expected in words
    assert RUN_YAML.strip() in page.words
    assert "F0.2" in page.words
    idle = 100 * Trace(spans=tuple(make_spans())).bubble()
    assert f"the workers stood idle for {idle:.1f} % of the time" in words
    simulated = 100 * make_trace(step=300).bubble_simulated()
    assert f"its actions cost in this step: there {simulated:.1f} % are idle." in words
    assert "simulated (pipeline 1)" in words
    assert "In the median step 12.5 % of the same time went into waiting" in words


def test_the_page_says_when_and_why_experts_moved(page, run_dir):
    assert "Dotted lines mark where experts moved to other ranks." in " ".join(page.captions)
    row = ["220", str(len(LAYERS)), "1.93", "1.07", "41.3", "0.62", MOVED.reason]
    cells = "".join(f"<td>{cell}</td>" for cell in row)
    assert cells in (run_dir / "report.html").read_text()


def test_the_page_says_what_the_scheduler_decided(tmp_path):
    folder = bare_run(tmp_path / "a", make_steps(3))
    layout = "layout: {pipeline: 2, experts: 2, schedule: auto}"
    (folder / "run.yaml").write_text(f"name: a\n{layout}\n")
    with MetricsLog.resume(folder / "metrics.jsonl", 3) as log:
        log.append(
            Decided(
                step=2, schedule="dualpipev", layers=(1, 1, 1, 1), micro_batch_size=1,
                micro_batches=8, step_time_s_before=0.2, step_time_s=0.1, reason="changes",
            )
        )  # fmt: skip
    assert "auto, dualpipev since step 2: 4 workers" in " ".join(page_of(folder).words)


def test_replaced_workers_are_not_called_the_same(tmp_path):
    switch = Switch(seconds_to_first_token=1.0, workers_before=(1, 2), workers_after=(1,))
    words = page_of(bare_run(tmp_path / "a", [switch])).words
    assert any("The workers were replaced between" in word for word in words)
    assert words[words.index("2") + 1] == "none"


def test_the_page_says_what_every_switch_took(tmp_path):
    switch = Switch(
        seconds_to_first_token=1.25, workers_before=(1, 2), workers_after=(1, 2), step=7,
        optimizer="park", parked_bytes=(3_000_000, 2_000_000), gradient_bytes=(900, 800),
        cache_bytes=(5_000, 4_000),
    )  # fmt: skip
    changes = [
        switch,
        BackToTraining(
            step=8, seconds_to_first_step=0.5, came_from="serve", optimizer="park", drain_s=2.0,
            num_cut=3,
        ),
        Paused(step=9, came_from="train"),
        dataclasses.replace(switch, step=9, came_from="pause", seconds_to_first_token=0.25),
    ]  # fmt: skip
    folder = bare_run(tmp_path / "a", changes)
    text = (page_of(folder), (folder / "report.html").read_text())[1]
    for row in (
        ("1", "2", "2", "2 MB", "800 B", "4 kB"),
        ("7", "train", "serve", "1.25", "last step to first token", "-", "-", "park"),
        ("7", "serve", "train", "0.50", "workers free to first step", "2.00", "3", "park"),
        ("9", "train", "pause", "-", "-", "-", "-", "-"),
        ("9", "pause", "serve", "0.25", "end of pause to first token", "-", "-", "park"),
    ):
        assert "".join(f"<td>{cell}</td>" for cell in row) in text, row
    assert "<th>optimizer state parked in host memory</th>" in text
    assert "optimizer state dropped" not in text
    # A run that only ever paused has no first token to tell of.
    page = page_of(bare_run(tmp_path / "b", changes[2:3]))
    assert "Modes" in page.headings
    assert page.tiles == {}


def test_run_without_steps(tmp_path):
    page = page_of(bare_run(tmp_path / "a", text=RUN_YAML))
    assert page.headings == ["Configuration"]
    assert any("has not finished a step" in word for word in page.words)
    assert page.tiles == {}


def test_run_of_one_step(tmp_path):
    page = page_of(bare_run(tmp_path / "a", make_steps(1)))
    assert page.headings == ["Learning", "Optimizer", "Experts", "Speed and checkpoints"]
    assert page.tags.count("svg") == 6


def test_dense_run_of_one_worker(tmp_path):
    steps = [
        dataclasses.replace(step, mtp_loss=(), bubble=0.0)
        for step in make_steps(40, layers=(), eval_every=100)[:39]
    ]
    page = page_of(bare_run(tmp_path / "a", steps, "train: {steps: 40}\nlayout: {}"))
    assert page.headings == ["Learning", "Optimizer", "Speed and checkpoints", "Configuration"]
    assert page.tags.count("svg") == 3
    assert set(page.tiles) == {"Training loss", "Throughput"}
    assert "one worker" in page.words
    assert "39 of 40 (639k tokens)" in page.words


def test_run_that_diverged(tmp_path):
    steps = [
        dataclasses.replace(
            step, loss=math.nan, grad_norm=math.inf, heldout_loss=None, heldout_bits_per_byte=None
        )
        for step in make_steps(35)
    ]
    evaluated = dataclasses.replace(steps[-1], heldout_bits_per_byte=math.nan)
    page = page_of(bare_run(tmp_path / "a", [*steps[:-1], evaluated]))
    assert page.tiles["Training loss"] == page.tiles["Held-out"] == "nan"
    assert page.tags.count("svg") == 5


def test_trace_alone(tmp_path):
    folder = bare_run(tmp_path / "a")
    write_trace(folder / "trace.json", Trace(tuple(make_spans())))
    page = page_of(folder)
    assert page.headings == ["Pipeline"]
    assert "worker 3" in page.words


def test_long_trace_is_cut_and_says_so(tmp_path):
    folder = bare_run(tmp_path / "a")
    spans = [
        Span(rank=0, name="W", category=Category.COMPUTE, start_s=i, end_s=i + 0.5)
        for i in range(3010)
    ]
    write_trace(folder / "trace.json", Trace(tuple(spans)))
    assert "The last 10 spans are left out" in page_of(folder).captions[0]


def test_timeline_ends_with_the_step():
    spans = make_spans()
    late = Span(0, "write checkpoint", Category.CHECKPOINT, 60.0, 61.0)
    assert timeline_figure(Trace((*spans, late)), None) == timeline_figure(
        Trace(tuple(spans)), None
    )


def test_a_trace_of_a_checkpoint_alone_is_no_timeline(tmp_path):
    folder = bare_run(tmp_path / "a")
    late = Span(0, "write checkpoint", Category.CHECKPOINT, 60.0, 61.0)
    write_trace(folder / "trace.json", Trace((late,)))
    assert page_of(folder).headings == []


def test_timeline_names_unknown_work_and_foreign_ranks():
    spans = (Span(rank=5, name="eval", category="compute", start_s=0.0, end_s=60.0),)
    svg = timeline_figure(Trace(spans=spans), Layout(pipeline=2))
    assert "other computation" in svg
    assert "worker 5<" in svg
    assert ">s<" in svg


def test_names_and_files_are_escaped(tmp_path):
    folder = bare_run(tmp_path / "a", text='name: "<b>x</b> $name"\nmodel: "<i>"\n')
    page = page_of(folder)
    assert "<b>x</b> $name" in page.words
    assert "i" not in page.tags


def test_thinning_keeps_the_mean_and_smoothing_skips_gaps():
    ys = np.sin(np.arange(5000))
    x, y = thin(range(5000), ys, most=100)
    assert len(x) == len(y) == 100
    assert y.mean() == pytest.approx(ys.mean())
    assert list(smooth([1.0, math.nan, 3.0, 5.0], 3)) == [1.0, 2.0, 4.0, 4.0]
