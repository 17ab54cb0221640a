"""The attention benchmark from beginning to end, as rows of plain data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dualray.data.dataset import TokenDataset
from dualray.errors import ConfigError
from dualray.model.formulas import cache_bytes_per_token, parameter_count
from dualray.platform.bench.attention import KINDS, Trained, Workload, evaluate, train
from dualray.platform.bench.decode import Decoder, heldout_ids, time_in_turn

CURVE_POINTS = 100
LAST_STEPS = 20
"""A training loss is the mean of so many last steps: single ones differ by their batch."""

Heard = Callable[[str], None]


def compare_attentions(
    workload: Workload, dataset: TokenDataset, *, on_part: Heard = lambda text: None
) -> list[dict[str, Any]]:
    """Train, evaluate and decode all kinds; one row each, JSON throughout.

    Raises ConfigError or DataError where the corpus does not suffice.
    """
    check(workload, dataset)
    # What the decoders read is asked for first: a corpus too short is told of at once.
    ids_BS = heldout_ids(dataset, workload.decode_batch, workload.contexts[-1])
    steps = workload.lr.steps
    trained = train(
        workload, dataset, on_step=lambda done: on_part(f"{done} of {steps} steps of each kind")
    )
    rows = []
    for kind in KINDS:
        on_part(f"{kind}: held-out text")
        rows.append(
            row(trained[kind], workload, asdict(evaluate(trained[kind].stage, dataset, workload)))
        )
    on_part("filling the caches")
    decoders = {kind: Decoder(trained[kind].stage, ids_BS) for kind in KINDS}
    for context in workload.contexts:
        on_part(f"decoding at {context} tokens")
        seconds = time_in_turn(decoders, context, repeats=workload.repeats)
        for result in rows:
            result["decode"].append(
                decode_row(
                    context, workload.decode_batch, seconds[result["attention"]], seconds[KINDS[0]]
                )
            )
    return rows


def check(workload: Workload, dataset: TokenDataset) -> None:
    """Raises ConfigError where training would see too little of the corpus to say anything."""
    tokens = dataset.split("train").num_tokens
    needed = workload.batch_size * workload.seq_len
    if tokens <= needed:
        raise ConfigError(
            f"--data {dataset.folder} has {tokens} training tokens and a step takes {needed}",
            hint="give a larger corpus",
        )


def row(trained: Trained, workload: Workload, heldout: dict[str, float]) -> dict[str, Any]:
    """One kind's figures, decoding still to come."""
    config = trained.config
    last = trained.losses[-LAST_STEPS:]
    return {
        "attention": config.attention,
        "parameters": parameter_count(config).total,
        "intermediate_size": config.intermediate_size,
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "training": {
            "curve": curve(trained.losses),
            "last_loss": statistics.fmean(last),
            "median_step_s": trained.step_s,
            "tokens_per_s": workload.batch_size * workload.seq_len / trained.step_s,
        },
        "heldout": heldout,
        "decode": [],
    }


def decode_row(
    context: int, batch: int, seconds: Sequence[float], reference: Sequence[float]
) -> dict[str, Any]:
    """Tokens a second at one context; the ratio to the first kind is taken step by step."""
    median = statistics.median(seconds)
    ratios = [theirs / ours for ours, theirs in zip(seconds, reference)]
    return {
        "context": context,
        "median_step_s": median,
        "tokens_per_s": batch / median,
        f"ratio_to_{KINDS[0]}": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """At most `CURVE_POINTS` points (step from 1, mean loss): equal runs of steps, at their end."""
    run = -(-len(losses) // CURVE_POINTS)
    starts = range(0, len(losses), run)
    return [
        (min(start + run, len(losses)), round(statistics.fmean(losses[start : start + run]), 5))
        for start in starts
    ]


def config_dict(workload: Workload, dataset: TokenDataset, corpus: str) -> dict[str, Any]:
    """The workload as a record stores it; `corpus` names the text."""
    return asdict(workload) | {
        "corpus": corpus,
        "vocab_size": dataset.vocab_size,
        "training_tokens": dataset.split("train").num_tokens,
        "data_sha256": dataset.data_sha256,
        "dtype": "float32",
    }
