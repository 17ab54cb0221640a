"""The benchmark's part on speculation, on a model that was never trained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from support.models import tiny_config, whole_model

from dualray.data.dataset import TokenDataset
from dualray.data.shards import build
from dualray.errors import RunError
from dualray.platform.bench.serve_speculation import QUICK, _check, speculation
from dualray.platform.bench.serve_speculation_result import (
    speculation_goals,
    speculation_sentences,
)
from dualray.platform.bench.serve_step_costs import step_costs
from dualray.platform.bench.serve_trained import Trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("speculation")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: the cat sat on a mat\n" for i in range(2000)))
    build([text], "bytes", folder / "data", heldout=0.2)
    return Trained(
        stage=whole_model(tiny_config(vocab_size=257, num_nextn_predict_layers=1)),
        dataset=TokenDataset.open(str(folder / "data")),
        corpus="cats",
        steps=0,
    )


def test_rows_hold_what_was_measured(trained):
    case = replace(QUICK, new_tokens=12, rounds=2)
    costs = step_costs(trained, batches=(1, 2), threads=1, quick=True)
    rows = speculation(trained, case, lambda text: None)
    asked = [(row["batch"], row["temperature"]) for row in rows]
    assert asked == [(1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)]
    for row in rows:
        # The prompt's step says one token of each; one at a time, they follow each other.
        assert row["plain"]["steps"] == 12 * 2 / row["batch"]
        assert row["drafting"]["steps"] <= row["plain"]["steps"]
        shares = row["acceptance_by_place"]
        assert len(shares) == case.draft_tokens
        assert shares == sorted(shares, reverse=True)
        assert row["same_completions"] == case.requests
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert len(speculation_sentences([*costs, *rows])) == 2 + 4
    met = dict.fromkeys(words for words, _, _ in speculation_goals(rows))
    assert len(met) == 2


def test_goals_are_judged_by_one_sequence_that_is_greedy():
    def row(batch, temperature, first, ratio):
        return {
            "part": "speculation",
            "batch": batch,
            "temperature": temperature,
            "acceptance_by_place": [first, 0.1],
            "ratio": ratio,
        }

    rows = [row(1, 0.0, 0.61, 1.09), row(1, 1.0, 0.1, 0.5), row(8, 0.0, 0.1, 0.5)]
    assert [(value, met) for _, value, met in speculation_goals(rows)] == [
        (0.61, True),
        (1.09, False),
    ]
    assert speculation_goals([{"part": "batch"}]) == []


def test_a_completion_that_begins_otherwise_is_no_comparison():
    _check("2 at once", {"0": [5, 6]}, {"0": [5, 7]})
    with pytest.raises(RunError) as raised:
        _check("2 at once", {"0": [5, 6]}, {"0": [4, 6]})
    assert str(raised.value) == (
        "with 2 at once, request 0 begins with token 4 of 2 with drafts and with 5 of 2 without; "
        "find what drafts have changed before comparing their speed."
    )


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dualray.platform.cli", "bench", "speculation", *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_trains_a_model_and_measures_it(tmp_path):
    record = tmp_path / "results.jsonl"
    done = command("--quick", "--json", "--record", str(record))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert json.loads(record.read_text()) == line
    asked = [
        (row["batch"], row["temperature"], row["train_steps"], row["same_completions"])
        for row in line["results"]
        if row["part"] == "speculation"
    ]
    assert asked == [(b, t, QUICK.train_steps, 2) for b in (1, 2) for t in (0.0, 1.0)]
    assert len(line["goals"]) == 2


def test_a_checkpoint_comes_with_its_data():
    done = command("--checkpoint", "runs/mine")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "--checkpoint is runs/mine and --data is None, and a trained model needs both; give the "
        "run's checkpoint and its data.path, or neither."
    )
