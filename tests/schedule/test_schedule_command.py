"""`dualray schedule` as a person and as a program see it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from dualray.errors import ConfigError
from dualray.platform.commands.schedule import schedule_command
from dualray.platform.trace import read_trace
from dualray.schedule.baselines import gpipe, one_f_one_b, zb1p
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.render import legend, render
from dualray.schedule.simulate import Costs, simulate


def invoke(*arguments):
    app = typer.Typer()
    app.command()(schedule_command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


def test_json():
    result = invoke("dualpipe", "--ranks", "2", "--chunks", "4", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "kind": "dualpipe",
        "ranks": 2,
        "chunks": 4,
        "actions": [
            ["F0.0", "F1.0", "F0.1", "B1.0", "F1.1&B0.0", "B1.1", "I0.1", "W"],
            ["F1.0", "F0.0", "F1.1", "B0.0", "F0.1&B1.0", "B0.1", "I1.1", "W"],
        ],
        "makespan": 12.0,
        "idle": [0.0, 0.0],
        "bubble": 0.0,
        "peak_activations": [3, 3],
        "peak_deferred": [1, 1],
    }


def test_costs_reach_the_simulation():
    result = invoke("1f1b", "--ranks", "2", "--chunks", "2", "--costs", "2,1,1,9", "--json")
    assert json.loads(result.stdout)["makespan"] == 12


def test_grid_and_summary():
    result = invoke("dualpipe", "--ranks", "2", "--chunks", "4")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "0 F0 f0 F1 b0    f1B0     b1    I1 W  ",
        "1 f0 F0 f1 B0    F1b0     B1    i1 w  ",
        "F forward, B backward, I input gradient, W weight gradient, F3b1 overlapped pair; "
        "upper case direction 0, lower case direction 1; '.' idle",
        "",
        "dualpipe: 2 ranks, 4 micro-batches, verified",
        "makespan 12, bubble 0.0%, idle per rank 0 to 0",
        "peak live micro-batches per rank 3, peak queued weight gradients 1",
    ]


def test_grid_of_a_v_names_its_legs():
    result = invoke("dualpipev", "--ranks", "2", "--chunks", "4")
    assert result.stdout.splitlines() == [
        "0 F0 F1 F2 f0 i0 w  f1 F3b1     ...f2B0     b2    ...f3B1     b3    I2 W  I3 W  ",
        "1 ...F0 f0 F1 f1 F2 b0    f2B0     F3b1     f3B1     b2    B2    ...i3 I3 w  W  ",
        "F forward, B backward, I input gradient, W weight gradient, F3b1 overlapped pair; "
        "upper case first leg, lower case second leg; '.' idle",
        "",
        "dualpipev: 2 ranks, 4 micro-batches, verified",
        "makespan 26, bubble 7.7%, idle per rank 2 to 2",
        "peak live micro-batches per rank 5, peak queued weight gradients 1, 2",
    ]


def test_legend_lists_only_what_is_drawn():
    assert legend(gpipe(2, 2)) == "F forward, B backward; '.' idle"
    assert legend(zb1p(2, 2)) == "F forward, I input gradient, W weight gradient; '.' idle"


def test_trace_opens_as_a_timeline_of_milliseconds(tmp_path):
    path = tmp_path / "pipeline.json"
    result = invoke("1f1b", "--ranks", "2", "--chunks", "2", "--trace", str(path))
    assert result.stdout.splitlines() == [
        "1f1b: 2 ranks, 2 micro-batches, verified",
        "makespan 9, bubble 33.3%, idle per rank 3 to 3",
        "peak live micro-batches per rank 2, 1, peak queued weight gradients 0",
        "",
        f"open {path} at https://ui.perfetto.dev",
    ]
    trace = read_trace(path)
    assert [(span.rank, span.name) for span in trace.spans if span.rank == 1] == [
        (1, "F0.0"), (1, "B0.0"), (1, "F0.1"), (1, "B0.1"),
    ]  # fmt: skip
    assert [span.end_s for span in trace.spans if span.rank == 0] == pytest.approx(
        [0.001, 0.002, 0.006, 0.009]
    )
    assert trace.bubble() == pytest.approx(1 / 3)
    events = json.loads(path.read_text())["traceEvents"]
    titles = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert titles == ["rank 0", "rank 1"]


def test_trace_and_json_together(tmp_path):
    path = tmp_path / "pipeline.json"
    result = invoke("gpipe", "--ranks", "2", "--chunks", "2", "--json", "--trace", str(path))
    assert json.loads(result.stdout)["kind"] == "gpipe"
    assert path.is_file()


@pytest.mark.parametrize(
    ("name", "why"), [("none/t.json", "No such file or directory"), ("", "it is not a file")]
)
def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path, name, why):
    path = tmp_path / name
    result = invoke("1f1b", "--ranks", "2", "--chunks", "2", "--trace", str(path))
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert str(result.exception) == (
        f"--trace is {path} and cannot be written ({why}); "
        "give a file in a folder that exists and that you may write to."
    )
    assert list(tmp_path.iterdir()) == []
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}*.partial"))


def test_grid_shows_idle_time_and_wraps():
    timeline = simulate(one_f_one_b(2, 2))
    assert render(timeline, width=17) == (
        "0 F0 F1 ......B0 \n1 ...F0 B0    F1 \n\n0    ...B1    \n1 B1    ......"
    )


@pytest.mark.parametrize(
    "costs", [Costs(weight_grad=0), Costs(forward=0.01), Costs(overlapped=0.5)]
)
def test_grid_rows_are_equally_long_for_odd_costs(costs):
    lines = render(simulate(dualpipe(4, 10), costs), width=10_000).splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("dualpipe", "--ranks", "3", "--chunks", "8"),
            "--ranks is 3 and must be even with dualpipe; set --ranks to 2 or 4, or KIND to 1f1b.",
        ),
        (
            ("dualpipe", "--ranks", "4", "--chunks", "6"),
            "--chunks is 6 and dualpipe needs at least 2 x --ranks = 8; "
            "set --chunks to 8, or KIND to 1f1b.",
        ),
        (
            ("dualpipev", "--ranks", "3", "--chunks", "5"),
            "--chunks is 5 and dualpipev needs at least 2 x --ranks = 6; "
            "set --chunks to 6, or KIND to 1f1b.",
        ),
        (
            ("interleaved", "--ranks", "3", "--chunks", "5"),
            "KIND is interleaved and must be one of gpipe, 1f1b, zb1p, dualpipev, dualpipe; "
            "choose 1f1b, which runs with any numbers.",
        ),
        (
            ("1f1b", "--ranks", "2", "--chunks", "4", "--costs", "1,2"),
            "--costs is 1,2 and must be four numbers F,I,W,FB; try --costs 1,1,1,3.",
        ),
        (
            ("1f1b", "--ranks", "2", "--chunks", "4", "--costs", "1,-2,1,1"),
            "costs.input_grad is -2.0 and must be a finite duration above 0; "
            "give four durations in one unit, such as 1,1,1,3.",
        ),
    ],
)
def test_mistakes_are_named_by_option(arguments, sentence):
    result = invoke(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == sentence
