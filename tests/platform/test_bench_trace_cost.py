"""The measurement of what a timeline costs: every part is there, and both kinds of step ran."""

from __future__ import annotations

import pytest

from dualray.parallel.train_config import TrainConfig
from dualray.platform.bench.trace_cost import Task, measure
from dualray.platform.preset import load_model


@pytest.mark.multiproc
def test_a_timeline_is_taken_apart() -> None:
    task = Task(
        model=load_model("tiny"),
        train=TrainConfig(steps=9, seq_len=16, micro_batches=4, lr=1e-3),
        warmup=1,
        pairs=2,
    )
    found = measure(task)
    assert found["pairs"] == 2
    # Every worker notes 8 steps of the schedule at least, and 4 parts of the optimizer's.
    assert found["spans"] > 4 * (8 + 4)
    assert set(found["parts"]) == {"noting_s", "sending_s", "writing_s"}
    assert found["share"] == pytest.approx(sum(found["parts"].values()) / found["step_s"])
    assert 0 < found["share_noting"] < found["share"]
    for of in ("wall_ratio", "cpu_ratio"):
        assert found[of]["low"] <= found[of]["median"] <= found[of]["high"]
