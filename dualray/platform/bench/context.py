"""What extending a model's context was good for: held-out loss by position, and retrieval.

Three readers of the same text: the model before its extension, read beyond the length it was
trained for; the same weights under the extension's YaRN, but without its training; and the
model after it. Losses are paired, window by window, so that their difference has an error of
its own: windows differ far more than models.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dualray.checkpoint.reader import Reader, expect
from dualray.checkpoint.whole_model import load_stage, stored_model
from dualray.data.dataset import TokenDataset
from dualray.errors import ConfigError, DataError
from dualray.inference.scoring import score
from dualray.model.stage import Stage
from dualray.platform.bench.needle import DEPTHS, Trial, make_trials, retrieve

READERS = ("before", "before_with_yarn", "after")
"""The un-extended model, its weights under the extension's YaRN, the extended model."""

Heard = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Tokens: what YaRN starts from, and what it reaches."""

    original: int
    extended: int

    @property
    def lengths(self) -> list[int]:
        """From the one to the other, doubling."""
        lengths = [self.original]
        while lengths[-1] * 2 < self.extended:
            lengths.append(lengths[-1] * 2)
        return [*lengths, self.extended]

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Ranges [first, end) of positions: the original context in two halves, then doubling."""
        edges = [0, self.original // 2, *self.lengths]
        return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def check(before: Reader, after: Reader, dataset: TokenDataset) -> Contexts:
    """Raises CheckpointError or ConfigError unless `after` is `before` at a longer context, and
    both read the dataset's tokens."""
    short, long = stored_model(before), stored_model(after)
    yarn = long.rope_scaling
    if yarn is None or yarn == short.rope_scaling:
        raise ConfigError(
            f"checkpoint {after.folder} has the rope_scaling of {before.folder}, so nothing was "
            "extended",
            hint="give a checkpoint from before the phases of section extend, then one from after",
        )
    context = long.max_position_embeddings
    same = replace(short, rope_scaling=yarn, max_position_embeddings=context)
    expect(after, asdict(same), dataset.tokenizer_sha256)
    expect(before, asdict(short), dataset.tokenizer_sha256)
    return Contexts(original=yarn.original_max_position_embeddings, extended=context)


def readers_of(before: Reader, after: Reader) -> dict[str, Stage]:
    """The three models, each whole. Memory is three times one's."""
    stages = {
        "before": load_stage(before),
        "before_with_yarn": load_stage(before),
        "after": load_stage(after),
    }
    stages["before_with_yarn"].set_rope(stages["after"].config)
    return stages


def compare(
    stages: dict[str, Stage],
    dataset: TokenDataset,
    contexts: Contexts,
    *,
    windows: int,
    needles: int,
    on_part: Heard = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of kind `loss`, one a bucket of positions, then of kind `needle`.

    Raises DataError where the held-out text is shorter than one window.
    """
    text = heldout_windows(dataset, contexts.extended, windows)
    losses = {}
    for name, stage in stages.items():
        on_part(f"{name}: loss of {len(text)} windows of {contexts.extended} tokens")
        losses[name] = losses_by_bucket(stage, text, contexts.buckets)
    rows = loss_rows(losses, contexts.buckets)
    for length in contexts.lengths:
        for depth in DEPTHS:
            trials = make_trials(dataset, length, depth, needles)
            if trials:
                on_part(f"needle at {depth:.0%} of {length} tokens")
                rows.append(needle_row(stages, trials, length, depth))
    return rows


def heldout_windows(dataset: TokenDataset, length: int, count: int) -> list[list[int]]:
    """At most `count` stretches of `length` tokens and the one after, apart from each other."""
    num_tokens = dataset.split("heldout").num_tokens
    available = (num_tokens - 1) // length
    if available < 1:
        raise DataError(
            f"the held-out split of {dataset.folder} has {num_tokens} tokens and one window has "
            f"{length + 1}",
            hint="build token shards of more text, or with a larger --heldout",
        )
    every = max(1, available // count)
    starts = range(0, available * length, every * length)[:count]
    return [dataset.tokens("heldout", start, length + 1).tolist() for start in starts]


def losses_by_bucket(
    stage: Stage, windows: Sequence[Sequence[int]], buckets: Sequence[tuple[int, int]]
) -> list[list[float]]:
    """Mean nats a token of each bucket of positions in each window, [window][bucket]."""
    return [
        [-math.fsum(chances[first:end]) / (end - first) for first, end in buckets]
        for chances in score(stage, windows)
    ]


def loss_rows(
    losses: dict[str, list[list[float]]], buckets: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """One row a bucket: means over the windows, and how much lower the extended model lies."""
    rows = []
    for index, (first, end) in enumerate(buckets):
        columns = {name: [window[index] for window in losses[name]] for name in READERS}
        gaps = [old - new for old, new in zip(columns["before"], columns["after"])]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        rows.append(
            {"kind": "loss", "first": first, "end": end, "windows": len(gaps)}
            | {name: statistics.fmean(column) for name, column in columns.items()}
            | {"gain": statistics.fmean(gaps), "gain_standard_error": error}
        )
    return rows


def needle_row(
    stages: dict[str, Stage], trials: Sequence[Trial], length: int, depth: float
) -> dict[str, Any]:
    """One row a length and depth."""
    found = {name: asdict(retrieve(stage, trials)) for name, stage in stages.items()}
    return {"kind": "needle", "length": length, "depth": depth, "trials": len(trials)} | found
