"""The report: one page that stands alone, shows the measured numbers and does without parts."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from synthetic_run import (
    LAYERS,
    MOVED,
    RUN_YAML,
    make_loads,
    make_run,
    make_spans,
    make_steps,
    make_trace,
    write_loads,
)
from typer.testing import CliRunner

from dualray.errors import RunError
from dualray.parallel.layout import Layout
from dualray.platform.commands.report import report
from dualray.platform.loads import LoadsLog, Place
from dualray.platform.metrics import Decided, Switch
from dualray.platform.metrics_log import MetricsLog, read_metrics
from dualray.platform.readable import count
from dualray.platform.report import write_report
from dualray.platform.report.experts import has_places, layers_shown, places_figure
from dualray.platform.report.loads import MAX_COLUMNS, read_history, relative_to_mean
from dualray.platform.report.style import VARIABLES, smooth, thin
from dualray.platform.report.timeline import timeline_figure
from dualray.platform.trace import Category, Span, Trace, write_trace

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self.tiles: dict[str, str] = {}
        self._title = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        within = self.open[-1] if self.open else ""
        if within in ("style", "script") or not data.strip():
            return
        self.words.append(data.strip())
        if within == "h2":
            self.headings.append(data)
        if within == "figcaption":
            self.captions.append(data)
        if "section" not in self.open and within == "span":
            self._title = data
        if "section" not in self.open and within == "b":
            self.tiles[self._title] = data


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def bare_run(folder, steps=(), text=""):
    folder.mkdir()
    (folder / "run.yaml").write_text(text)
    with MetricsLog.create(folder / "metrics.jsonl") as log:
        for step in steps:
            log.append(step)
    return folder


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


def history_of(folder, steps, nodes=("a",)):
    write_loads(folder, steps, nodes=nodes)
    history = read_history(folder)
    assert history is not None
    return history


def test_relative_loads_have_mean_one_and_bounded_columns(tmp_path):
    steps = make_loads(500, layers=(4,), num_experts=8)
    history = history_of(tmp_path / "a", steps)
    assert history.experts_LEC.shape == (1, 8, MAX_COLUMNS)
    assert (history.first, history.last, history.layers) == (1, 500, (4,))
    np.testing.assert_allclose(history.relative(4).mean(axis=0), 1.0)
    # Every step is in one column, in order.
    per_step = np.array([loads[4] for loads in steps]).T
    np.testing.assert_array_equal(history.experts_LEC[0].sum(axis=1), per_step.sum(axis=1))
    np.testing.assert_array_equal(history.experts_LEC[0, :, 0], per_step[:, :3].sum(axis=1))
    np.testing.assert_array_equal(history.experts_LEC[0, :, -1], per_step[:, -2:].sum(axis=1))
    one = history_of(tmp_path / "b", steps[:1]).relative(4)
    np.testing.assert_allclose(one[:, 0], per_step[:, 0] / per_step[:, 0].mean())


def test_many_layers_are_sampled_with_both_ends(tmp_path):
    loads = make_loads(1, layers=tuple(range(3, 61)), num_experts=2)
    shown, total = layers_shown(history_of(tmp_path, loads))
    assert (len(shown), total, shown[0], shown[-1]) == (12, 58, 3, 60)


def test_places_are_compared_with_those_that_hold_the_layer(tmp_path):
    """Layer 1 lives on nodes a and b, layer 2 on b alone; rank 1 has three quarters of layer 1."""
    with LoadsLog.resume(tmp_path, 0) as log:
        for step in (1, 3):
            log.add(
                step,
                {
                    Place(1, 0, 0, "a"): 10,
                    Place(1, 1, 1, "b"): 30,
                    Place(2, 0, 0, "b"): 7,
                    Place(2, 1, 1, "b"): 7,
                },
            )
    history = read_history(tmp_path)
    assert history is not None
    nodes = relative_to_mean(history.nodes_LNC)
    np.testing.assert_allclose(nodes, [[0.5, np.nan, 0.5], [1.25, np.nan, 1.25]])
    ranks = relative_to_mean(history.ranks_LRC)
    np.testing.assert_allclose(ranks, [[0.75, np.nan, 0.75], [1.25, np.nan, 1.25]])
    # A step without rows is a gap in the picture, not an idle one.
    assert np.isnan(history.relative(1)[:, 1]).all()
    assert "node" in places_figure(history)


def test_a_single_place_is_not_compared(tmp_path):
    one = history_of(tmp_path / "one", make_loads(3))
    two = history_of(tmp_path / "two", make_loads(3), nodes=("a", "b"))
    assert not has_places(one)
    assert has_places(two)
    svg = places_figure(two)
    assert "load of every expert rank" in svg
    assert "load of every node" in svg


def test_a_run_of_before_loads_were_tables(tmp_path):
    folder = bare_run(tmp_path / "a", make_steps(40))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["max_vio_run"], line["max_vio_run_per_layer"]
        line["loads"] = {"1": [1, 2]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "Experts" in page.headings
    assert page.tags.count("svg") == 6
    assert any(caption.endswith("got twice its share.") for caption in page.captions)


def test_thinning_keeps_the_mean_and_smoothing_skips_gaps():
    ys = np.sin(np.arange(5000))
    x, y = thin(range(5000), ys, most=100)
    assert len(x) == len(y) == 100
    assert y.mean() == pytest.approx(ys.mean())
    assert list(smooth([1.0, math.nan, 3.0, 5.0], 3)) == [1.0, 2.0, 4.0, 4.0]


def test_out_names_the_file(run_dir, tmp_path):
    out = tmp_path / "page.html"
    assert write_report(run_dir, out) == out
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def sentence(folder, out=None) -> str:
    with pytest.raises(RunError) as caught:
        write_report(folder, out)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence(tmp_path / "nothing") == (
        f"{tmp_path / 'nothing'} is not a folder; "
        "name a folder that `dualray train` wrote, such as runs/demo."
    )


def test_another_folder_is_named_with_runs_nearby(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    bare_run(runs / "small")
    assert sentence(runs) == (
        f"{runs} holds none of run.yaml, run.json, metrics.jsonl and so is not the folder of a "
        f"run; name the folder of a run, for instance {runs / 'small'}."
    )
    assert not (runs / "report.html").exists()


def test_a_damaged_run_file_is_named(tmp_path):
    folder = bare_run(tmp_path / "a", text="name: [")
    assert sentence(folder) == (
        f"{folder / 'run.yaml'} cannot be parsed; restore the file or delete it."
    )
    (folder / "run.yaml").write_bytes(b"name: \xff")
    assert sentence(folder) == (
        f"byte 6 of {folder / 'run.yaml'} is not UTF-8; restore the file or delete it."
    )


def test_an_unwritable_place_is_named(run_dir, tmp_path):
    assert sentence(run_dir, tmp_path) == (
        f"--out is {tmp_path} and that is a folder; "
        f"name a file, such as {tmp_path / 'report.html'}."
    )
    out = tmp_path / "missing" / "page.html"
    assert sentence(run_dir, out) == (
        f"--out is {out} and {out.parent} is not a folder; "
        "create that folder first, or name a file elsewhere."
    )


def test_command_says_where_the_page_is(run_dir, tmp_path):
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(run_dir), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert result.output == f"report written to {tmp_path / 'page.html'}; open it in a browser\n"
