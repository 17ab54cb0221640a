"""Experts that move in real Ray actors: while they train, while they serve, and after a resume."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from support.runs import dualray, losses_of, make_corpus, metrics_of, started, write_run_file

from dualray.platform.client import Client

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

# A constant learning rate, so that the run that is resumed for more steps is the same.
TRAIN = {"steps": 6, "dtype": "float64", "optimizer": "adamw", "min_lr": 3e-3}
# Moving costs nothing and every gain counts, so that a tiny model's experts move.
MOVING = {
    "redundant": 2, "rebalance_every": 2, "serve_rebalance_every": 3, "min_gain": 0.0,
    "link_bytes_per_s": 1e15, "ranks_per_node": 1,
}  # fmt: skip


def _generate(target: str, seed: int) -> str:
    prompt = "the cat sat on a mat while dogs ran "[seed % 7 :]
    with Client(target) as client:
        sampling = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
        return "".join(client.generate(prompt, sampling, model="moving"))


def test_experts_move_in_training_and_in_serving(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    write_run_file(tmp_path / "still.yaml", data, train=TRAIN, serve={"after_training": False})
    write_run_file(tmp_path / "moving.yaml", data, train=TRAIN, experts=MOVING)
    assert dualray("train", "still.yaml", cwd=tmp_path).code == 0
    with started("train", "moving.yaml", "--set", "train.steps=4", cwd=tmp_path) as command:
        command.line(r"^experts after step 2: \d+ of \d+ layers move")
        serving = command.line(r"serving at (\S+:\d+) from worker processes ([\d, ]+)$")
        first = [_generate(serving[1], seed) for seed in range(4)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda seed: _generate(serving[1], seed), range(48)))
        # No request failed, and what was answered does not depend on where experts are.
        assert [answers[seed] for seed in range(4)] == first
        assert all(answers[seed] == answers[seed % 7] for seed in range(48))
        command.line(r"^experts while serving: \d+ of \d+ layers move")
        assert dualray("stop", "moving", cwd=tmp_path).code == 0
        assert command.end().code == 0
    run = tmp_path / "runs" / "moving"
    moved = [row for row in metrics_of(run) if row.get("event") == "experts_moved"]
    assert moved[0]["step"] == 2
    assert moved[0]["num_bytes"] > 0
    assert moved[0]["imbalance_after"] < moved[0]["imbalance_before"]
    steps = [row for row in metrics_of(run) if "event" not in row]
    assert all(step["rank_imbalance"] >= 1 and step["expert_s"] > 0 for step in steps)

    # A resumed run goes on where experts had moved to.
    resumed = dualray(
        "train", "moving.yaml", "--resume", "--set", "serve.after_training=false", cwd=tmp_path
    )
    assert (resumed.code, resumed.err) == (0, "")
    with started("serve", "runs/moving", cwd=tmp_path) as server:
        server.line("^serving at ")
        assert dualray("stop", "moving-serve", cwd=tmp_path).code == 0
        assert server.end().code == 0
    expected = losses_of(tmp_path / "runs" / "still")
    assert losses_of(run) == pytest.approx(expected, rel=1e-9)

    tables = [pa.ipc.open_file(path).read_all() for path in sorted((run / "loads").iterdir())]
    loads = pa.concat_tables(tables).to_pylist()
    assert {row["step"] for row in loads} == set(range(1, 7))
    # An expert that lives twice has its tokens in two places.
    places = {(row["layer"], row["expert"], row["rank"]) for row in loads if row["step"] == 6}
    assert len(places) > len({place[:2] for place in places})
    report = dualray("report", "runs/moving", cwd=tmp_path)
    assert report.code == 0
    assert "Load of every expert" in (run / "report.html").read_text()
    assert json.loads((run / "run.json").read_text())["state"]
