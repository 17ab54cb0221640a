"""`dualray bench overlap`, at its smallest."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from dualray.parallel.groups import Ways
from dualray.platform.bench.hosts import can_emulate_hosts
from dualray.platform.bench.overlap import NoJourney, _row
from dualray.platform.commands.bench import app


@pytest.mark.hosts
@pytest.mark.multiproc
def test_two_hosts_walk_three_ways(tmp_path) -> None:
    if reason := can_emulate_hosts():
        pytest.skip(reason)
    record = tmp_path / "results.jsonl"
    result = CliRunner().invoke(app, ["overlap", "--quick", "--json", "--record", str(record)])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(record.read_text()) == line
    free, shaped = line["results"]
    assert (free["link"], shaped["link"]) == ("free", "shaped")
    assert free["rate_bits_per_s"] is None
    # Half of all rows cross the link, in four exchanges a layer, either way.
    config = line["config"]
    tokens = config["micro_batches"] * config["sequences"] * config["seq_len"]
    rows = 4 * config["num_hidden_layers"] * tokens * 4 // 2
    payload = rows * config["hidden_size"] * 4
    assert 0.8 * payload < shaped["step_bytes"] < 1.3 * payload
    # What the link carries takes its time, whatever else the machine does.
    assert shaped["sequential_s"] > 0.8 * 8 * payload / shaped["rate_bits_per_s"]
    assert shaped["hidden_min"] <= shaped["hidden"] <= shaped["hidden_max"]


def test_hidden_is_what_the_overlapped_walk_saves_of_the_sequential_one_s_communication() -> None:
    ranks = [
        {"floor": [1.0, 1.0], "sequential": [2.0, 3.0], "overlapped": [1.2, 1.4]},
        {"floor": [0.9, 1.0], "sequential": [1.9, 2.0], "overlapped": [1.1, 1.5]},
    ]
    row = _row("shaped", ranks, 1e8)
    # Rounds of the slowest ranks: floor 1, sequential 2 and 3, overlapped 1.2 and 1.5.
    assert row["hidden_min"] == pytest.approx(0.75)
    assert row["hidden_max"] == pytest.approx(0.8)
    assert row["communication_per_computation"] == pytest.approx(1.5)
    assert "hidden" not in _row("free", ranks, None)


def test_without_a_journey_rows_arrive_where_they_are() -> None:
    exchange = NoJourney()
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    counts = torch.tensor([1, 2])
    assert torch.equal(exchange.start_counts(counts, [1], [1], None)(), counts)
    nobody = Ways(rows=None, gradients=None)
    out = exchange(rows, [1, 2], [1, 2], nobody, "dispatch 0")
    assert torch.equal(out, rows)
    out.sum().backward()
    assert torch.equal(rows.grad, torch.ones(3, 2))


def test_a_record_that_cannot_be_written_is_said_at_once(tmp_path) -> None:
    result = CliRunner().invoke(app, ["overlap", "--record", str(tmp_path / "no" / "file")])
    assert result.exit_code != 0
    assert "--record is" in str(result.exception)
