"""The one-process model beside Hugging Face's in every respect: training, memory, decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dualray.platform.bench import training
from dualray.platform.bench.decode_peer import DecodeCase, compare_decoding
from dualray.platform.bench.memory import peak_memory
from dualray.platform.bench.training import DTYPES, Workload, compare

WARMUP = 2
"""Unmeasured pairs of training steps."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained and what is decoded."""

    workload: Workload
    cases: tuple[DecodeCase, ...]
    """Decoded eagerly; the last one also compiled, where that is asked for."""


FULL = Size(
    workload=training.FULL,
    cases=(
        DecodeCase(batch=16, context=256),
        DecodeCase(batch=16, context=1024),
        DecodeCase(batch=1, context=256),
    ),
)
QUICK = Size(
    workload=training.QUICK,
    cases=(DecodeCase(batch=4, context=64), DecodeCase(batch=1, context=64)),
)
"""Seconds instead of minutes; overheads weigh more than in `FULL`."""


def compare_model(
    size: Size,
    dtype: str,
    *,
    pairs: int,
    compiled: bool,
    on_part: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The rows of one dtype. Raises RunError where the two sides do not compute the same."""
    total = WARMUP + pairs
    on_part("building both models")
    comparison = compare(
        size.workload,
        dtype,
        pairs=pairs,
        warmup=WARMUP,
        on_pair=lambda done: on_part(f"training, {done} of {total} pairs of steps"),
    )
    rows = [{"part": "training"} | comparison.as_dict()]
    on_part("memory of a training step")
    memory = peak_memory(size.workload, dtype, torch.get_num_threads())
    rows += [] if memory is None else [memory]
    cases = list(size.cases)
    if compiled:
        last = cases[-1]
        cases.append(DecodeCase(batch=last.batch, context=last.context, compiled=True))
    rows += compare_decoding(
        size.workload.model,
        (dtype, DTYPES[dtype]),
        cases,
        pairs=pairs,
        on_case=lambda text: on_part(f"decoding {text}"),
    )
    return rows


def config_dict(size: Size) -> dict[str, Any]:
    """The sizes as a record stores them."""
    return training.config_dict(size.workload, warmup=WARMUP)
