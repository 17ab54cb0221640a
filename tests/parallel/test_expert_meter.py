"""Rows and seconds of a worker's experts: for whoever asks, and not in what is compiled."""

from __future__ import annotations

import time

import torch
from support.models import tiny_config

from dualray.model.moe import Experts
from dualray.parallel.expert_meter import ExpertMeter


def _experts() -> Experts:
    experts = Experts(tiny_config(), (0, 1))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    return experts


def _forward(experts: Experts) -> torch.Tensor:
    rows = torch.ones(4, tiny_config().hidden_size)
    with torch.no_grad():
        return experts(rows, 2, None)  # as many rows for each


def test_seconds_are_those_between_begin_and_take() -> None:
    meter, experts = ExpertMeter(), _experts()
    meter.watch({3: experts})
    _forward(experts)
    assert meter.take().seconds == {}
    meter.begin()
    meter.rows[3] = torch.tensor([1, 3])
    before = time.perf_counter()
    _forward(experts)
    _forward(experts)
    took = time.perf_counter() - before
    work = meter.take()
    assert work.slot_rows == {3: [1, 3]}
    assert 0 < work.seconds[3] <= took
    _forward(experts)
    meter.begin()
    assert meter.take().seconds == {}
    assert meter.take().slot_rows == {}


def test_a_watched_layer_compiles_whole() -> None:
    meter, experts = ExpertMeter(), _experts()
    expected = _forward(experts)
    meter.watch({3: experts})
    meter.begin()
    compiled = torch.compile(_forward, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(experts), expected)
    assert meter.take().seconds == {}
