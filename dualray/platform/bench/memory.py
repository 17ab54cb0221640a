"""Peak memory of a training step, each side in a process of its own.

The peak counts from what the process held once everything was imported, so that it is the
weights, gradients, optimizer state and activations, and not the libraries' code.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dualray.parallel.optimizer import OptimizerConfig
from dualray.platform.bench.hugging_face import HuggingFaceTrainer, import_transformers
from dualray.platform.bench.training import (
    CLIP_NORM,
    DTYPES,
    LR,
    DualrayTrainer,
    Trainer,
    Workload,
    training_batch,
)

_STEPS = 3
_STATUS = Path("/proc/self/status")


def peak_memory(workload: Workload, dtype: str, threads: int) -> dict[str, Any] | None:
    """Bytes at the peak of both sides and their ratio; None where the kernel does not tell."""
    if not _STATUS.is_file():
        return None
    sides = {}
    for name, build in (("dualray", _dualray), ("hugging_face", _hugging_face)):
        # A fresh process: memory that an earlier model has freed would hide the peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sides[name] = pool.apply(_measure, (build, workload, dtype, threads))
    return {
        "part": "memory",
        "dtype": dtype,
        **{name: {"peak_bytes": peak} for name, peak in sides.items()},
        "ratio": sides["hugging_face"] / sides["dualray"],
    }


def _measure(
    build: Callable[[Workload, torch.dtype], Trainer], workload: Workload, dtype: str, threads: int
) -> int:
    torch.set_num_threads(threads)
    import_transformers().AutoModelForCausalLM  # noqa: B018  (it imports lazily)
    before = _status("VmRSS")
    side = build(workload, DTYPES[dtype])
    gc.collect()
    ids, labels = training_batch(workload)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    for _ in range(_STEPS):
        side.step(ids, labels)
    return _status("VmHWM") - before


def _dualray(workload: Workload, dtype: torch.dtype) -> Trainer:
    return DualrayTrainer(workload.model, dtype, OptimizerConfig(kind="adamw"))


def _hugging_face(workload: Workload, dtype: torch.dtype) -> Trainer:
    stage = DualrayTrainer(workload.model, dtype, OptimizerConfig(kind="adamw")).stage
    return HuggingFaceTrainer(workload.model, stage, OptimizerConfig(kind="adamw"), LR, CLIP_NORM)


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {field}"
    return int(match[1]) * 1024
