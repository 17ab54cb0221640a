"""The balance benchmark from beginning to end, as rows of plain data, and what they say."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dualray.data.dataset import TokenDataset
from dualray.errors import ConfigError
from dualray.model.formulas import parameter_count
from dualray.platform.bench.attention_result import LAST_STEPS, curve
from dualray.platform.bench.balance import Trained, Workload, model_for, train_one

SETTINGS = ("none", "aux_loss", "bias", "aux_loss_and_bias")
FIGURES = (
    "train_loss",
    "heldout_loss",
    "heldout_bits_per_byte",
    "max_vio_batch",
    "max_vio_global",
    "max_vio_run",
)
"""Losses in nats a token; all are the lower the better."""
_EXPECTED = (
    ("max_vio_batch", "none"),
    ("max_vio_global", "none"),
    ("max_vio_batch", "aux_loss"),
    ("max_vio_global", "aux_loss"),
    ("heldout_loss", "aux_loss"),
    ("heldout_loss", "none"),
)
"""In which figures biases should beat, or in losses not fall behind, which other setting."""
_T_95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895}
"""Student's t by degrees of freedom: 95 % of a fair difference's draws lie below so many standard
errors."""

WORDS = {
    "max_vio_batch": "MaxVio of a batch",
    "max_vio_global": "MaxVio of the held-out text",
    "heldout_loss": "held-out loss",
    "none": "none",
    "aux_loss": "auxiliary loss",
    "bias": "bias",
    "aux_loss_and_bias": "both",
}
"""What tables call figures and settings."""

Row = dict[str, Any]
Heard = Callable[[str], None]


def compare_balance(
    workload: Workload, data: Path, *, on_part: Heard = lambda text: None
) -> list[Row]:
    """Train every setting with every seed, in as many processes of one thread as there are cores.

    One row a setting, JSON throughout. Raises ConfigError where the corpus is too small.
    """
    check(workload, data)
    jobs = [(setting, seed) for seed in workload.seeds for setting in SETTINGS]
    found: dict[tuple[str, int], Trained] = {}
    pool = ProcessPoolExecutor(
        max_workers=min(len(jobs), len(os.sched_getaffinity(0))),
        mp_context=multiprocessing.get_context("spawn"),  # threads of torch survive no fork
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    on_part(f"0 of {len(jobs)} trainings")
    try:
        waiting = {pool.submit(train_one, workload, *job, data): job for job in jobs}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            on_part(f"{len(found)} of {len(jobs)} trainings")
    finally:
        pool.shutdown(cancel_futures=True)
    return [row(setting, [found[setting, seed] for seed in workload.seeds]) for setting in SETTINGS]


def check(workload: Workload, data: Path) -> None:
    """Raises ConfigError where training would see too little of the corpus to say anything."""
    train = workload.train
    needed = train.micro_batches * train.micro_batch_size * train.seq_len
    dataset = TokenDataset.open(data, verify=False)
    for split in ("train", "heldout"):
        tokens = dataset.split(split).num_tokens
        if tokens <= needed:
            raise ConfigError(
                f"--data {data} has {tokens} tokens of {split} text and a batch takes {needed}",
                hint="give a larger corpus",
            )


def row(setting: str, runs: Sequence[Trained]) -> Row:
    """One setting: each seed's figures, and their means."""
    seeds = [
        {
            "seed": run.seed,
            "train_loss": statistics.fmean(run.losses[-LAST_STEPS:]),
            "heldout_loss": run.heldout_loss,
            "heldout_bits_per_byte": run.heldout_bits_per_byte,
            "max_vio_batch": run.last_max_vio,
            "max_vio_global": run.heldout_max_vio,
            "max_vio_run": run.max_vio_run,
            "step_s": run.step_s,
            "loss_curve": curve(run.losses),
            "max_vio_curve": curve(run.max_vio),
        }
        for run in runs
    ]
    means = {name: statistics.fmean(seed[name] for seed in seeds) for name in FIGURES}
    return {"balance": setting, "mean": means, "seeds": seeds}


def claims(rows: Sequence[Row]) -> list[Row]:
    """What was expected as published, each held against the differences seed by seed.

    `verdict` is `yes`, `no`, or `undecided` where the seeds differ too much among themselves.
    """
    by_setting = {row["balance"]: row for row in rows}

    def differences(figure: str, other: str) -> list[float]:
        ours, theirs = by_setting["bias"]["seeds"], by_setting[other]["seeds"]
        return [mine[figure] - its[figure] for mine, its in zip(ours, theirs, strict=True)]

    result = []
    for figure, other in _EXPECTED:
        is_loss = figure == "heldout_loss"
        wanted = "no higher" if is_loss else "a lower"
        words = f"bias has {wanted} {WORDS[figure]} than {WORDS[other]}"
        verdict = judged(differences(figure, other), lower=not is_loss)
        result.append({"claim": words, "figure": figure, "against": other, **verdict})
    return result


def judged(differences: Sequence[float], *, lower: bool) -> Row:
    """Paired differences, their mean and its standard error, and a verdict.

    `lower` asks for differences below 0: `yes` if the mean lies further below it than 95 % of
    draws of equal things would, `no` if it is not below it at all. Otherwise a mean that is not
    above 0 is a `yes`, and one further above it than 95 % of draws a `no`.
    """
    count, mean, error = len(differences), statistics.fmean(differences), None
    is_sure = False
    if count > 1:
        error = statistics.stdev(differences) / math.sqrt(count)
        is_sure = abs(mean) > _T_95.get(count - 1, max(_T_95.values())) * error
    if (mean < 0 and is_sure) if lower else mean <= 0:
        verdict = "yes"
    elif mean >= 0 if lower else is_sure:
        verdict = "no"
    else:
        verdict = "undecided"
    return {
        "differences": list(differences),
        "mean": mean,
        "standard_error": error,
        "verdict": verdict,
    }


def config_dict(workload: Workload, data: Path, corpus: str) -> Row:
    """The workload as a record stores it; `corpus` names the text."""
    dataset = TokenDataset.open(data, verify=False)
    return asdict(workload) | {
        "model": asdict(model_for(workload, dataset)),
        "parameters": parameter_count(model_for(workload, dataset)).total,
        "corpus": corpus,
        "vocab_size": dataset.vocab_size,
        "training_tokens": dataset.split("train").num_tokens,
        "data_sha256": dataset.data_sha256,
        "processes": len(os.sched_getaffinity(0)),
    }
