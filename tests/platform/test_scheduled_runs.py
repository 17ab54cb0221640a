"""A run whose schedule is decided while it trains, in real Ray actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import dualray, losses_of, make_corpus, metrics_of, started, write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PINNED = {"pipeline": 2, "experts": 2, "schedule": "dualpipe"}
OPEN = {"pipeline": 2, "experts": 2, "schedule": "auto"}
# What the clock says must not matter to a test: one schedule alone is left to choose.
SCHEDULER = {"schedules": ["dualpipev"], "warmup_steps": 0, "measure_steps": 1}


def test_workers_change_schedule_stages_and_micro_batches_and_serve(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    # A constant learning rate, so that the run that is resumed for more steps is the same.
    train = {
        "steps": 6,
        "dtype": "float64",
        "optimizer": "adamw",
        "micro_batches": 8,
        "min_lr": 3e-3,
    }
    write_run_file(
        tmp_path / "pinned.yaml", data, train=train, layout=PINNED, serve={"after_training": False}
    )
    write_run_file(
        tmp_path / "open.yaml", data, train=train, layout=OPEN, scheduler=SCHEDULER, name="open"
    )
    assert dualray("train", "pinned.yaml", cwd=tmp_path).code == 0
    with started("train", "open.yaml", "--set", "train.steps=4", cwd=tmp_path) as command:
        command.line(r"^scheduler after step 2: changes: the present schedule is not among")
        assert "dualpipev" in command.line("<- chosen$").string
        serving = command.line(r"serving at (\S+:\d+) from worker processes ([\d, ]+)$")
        pids = [int(pid) for pid in serving[2].split(",")]
        answer = dualray(
            "generate", "the cat ", "--target", serving[1], "--max-tokens", "4", "--ignore-eos",
            "--json", cwd=tmp_path,
        )  # fmt: skip
        assert json.loads(answer.out)["training_step"] == 4
        assert dualray("stop", "open", cwd=tmp_path).code == 0
        assert command.end().code == 0
    run = tmp_path / "runs" / "open"
    [switch] = [row for row in metrics_of(run) if row.get("event") == "switch"]
    # The processes that began with DualPipe and ended with DualPipeV are the ones that serve.
    assert switch["workers_before"] == switch["workers_after"] == pids

    # A resumed run goes on as was decided, without measuring again.
    resumed = dualray(
        "train", "open.yaml", "--resume", "--set", "serve.after_training=false", cwd=tmp_path
    )
    assert (resumed.code, resumed.err) == (0, "")
    assert "scheduler after" not in resumed.out
    [decided] = [row for row in metrics_of(run) if row.get("event") == "decided"]
    assert (decided["step"], decided["schedule"]) == (2, "dualpipev")
    assert sum(decided["layers"]) == 4
    assert len(decided["layers"]) == 4
    assert decided["micro_batches"] * decided["micro_batch_size"] == 8
    # It can be served again by itself.
    with started("serve", "runs/open", cwd=tmp_path) as server:
        server.line("^serving at ")
        assert dualray("stop", "open-serve", cwd=tmp_path).code == 0
        assert server.end().code == 0
    # Who computes what when changes nothing of what is computed.
    expected = losses_of(tmp_path / "runs" / "pinned")
    assert losses_of(run) == pytest.approx(expected, rel=1e-9)
