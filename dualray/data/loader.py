"""Which tokens step s trains on: a pure function of (data, seed, step), with no state to save.

A split's stream is cut into non-overlapping windows of `seq_len` tokens (concat-and-chunk, as in
DeepSeek-V3, arXiv 2412.19437 section 4.1); each window also sees the 1 + D tokens that follow it,
which it needs as targets of the next token and of D MTP depths. A window is a *sample*. Every epoch
visits each sample once in an order that a keyed permutation gives. The global samples of a step
are fixed first and then sliced over data-parallel ranks, whose number thus changes nothing.

The held-out split is read in order and to its very end: a last window without D followers is
padded and masked, so that the losses at depth 0 cover every token but the stream's first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualray.data.dataset import TokenDataset
from dualray.data.permutation import permute
from dualray.errors import ConfigError, DataError

IGNORED = -100
"""Label of a position that counts in no loss."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section `data` of a run file."""

    path: str
    """Folder made by `dualray data build`."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "data.path is empty and must name a folder of token shards",
                hint="build one with `dualray data build`",
            )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """B sequences of S tokens with D + 1 depths of targets; C-contiguous int64 arrays."""

    ids: np.ndarray
    """(B, S)."""
    labels: np.ndarray
    """(D + 1, B, S): labels[d, b, t] is the token 1 + d after ids[b, t], or IGNORED."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The samples of one step before they are sliced over ranks."""

    split: str
    sample_ids: np.ndarray
    """(G,) int64 window numbers; -1 is padding behind the held-out split's end."""


class Loader:
    """Reads batches of one dataset. Cheap to make; two with equal arguments give equal batches."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        seq_len: int,
        depths: int,
        first_step: int = 0,
        first_sample: int = 0,
    ) -> None:
        """`depths` is the number D of MTP depths (0 or more).

        Step `first_step` of the training split begins with sample `first_sample`: a run that
        changes its sequence length goes on in the corpus where it was.
        """
        if seq_len < 1 or depths < 0:
            raise ConfigError(
                f"seq_len is {seq_len} and depths is {depths}, they must be at least 1 and 0",
                hint="set train.seq_len to 1 or more",
            )
        self.dataset = dataset
        self.seed = seed
        self.seq_len = seq_len
        self.depths = depths
        self.first_step = first_step
        self.first_sample = first_sample

    def num_samples(self, split: str = "train") -> int:
        """Windows of a split; of the held-out one also the incomplete last window counts."""
        num_tokens = self.dataset.split(split).num_tokens
        if split == "train":
            return max(0, (num_tokens - 1 - self.depths) // self.seq_len)
        return max(0, -(-(num_tokens - 1) // self.seq_len))

    def num_batches(self, num_sequences: int, split: str = "heldout") -> int:
        """Batches of `num_sequences` in a split, the held-out one's padded last included."""
        num_samples = self.num_samples(split)
        return (
            num_samples // num_sequences if split == "train" else -(-num_samples // num_sequences)
        )

    def batch(self, step: int, num_sequences: int, split: str = "train") -> GlobalBatch:
        """The samples of step `step` of `num_sequences` sequences over all ranks. Reads no token.

        Raises DataError if the split has fewer samples than one step needs, or (held-out) if it
        ends before `step`.
        """
        first = step * num_sequences
        if split == "train":
            first = self.first_sample + (step - self.first_step) * num_sequences
        return self.samples(first, num_sequences, split)

    def samples(self, first: int, count: int, split: str = "train") -> GlobalBatch:
        """The `count` samples that follow the first `first` ones: `batch` for steps of any size."""
        n = self.num_samples(split)
        index = np.arange(first, first + count, dtype=np.int64)
        if split != "train":
            if first >= n:
                raise DataError(
                    f"the {split} split has {n} sequences of {self.seq_len} tokens and "
                    f"number {first} was asked for",
                    hint=f"ask for at most {self.num_batches(count, split)} batches of {count}",
                )
            return GlobalBatch(split=split, sample_ids=np.where(index < n, index, -1))
        if n < count:
            raise DataError(
                f"the train split has {n} sequences of {self.seq_len} tokens and one step needs "
                f"{count}",
                hint="give more text, or lower train.seq_len, train.micro_batches or "
                "train.micro_batch_size",
            )
        epochs, position = np.divmod(index, n)
        sample_ids = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sample_ids[here] = permute(position[here], n, self._key(int(epoch)))
        return GlobalBatch(split=split, sample_ids=sample_ids)

    def sequences(
        self, step: int, first: int, count: int, global_sequences: int, split: str = "train"
    ) -> Tokens:
        """Sequences [first, first + count) of the `global_sequences` of step `step`."""
        if not 0 <= first <= first + count <= global_sequences:
            raise ValueError(f"[{first}, {first + count}) is not within {global_sequences}")
        batch = self.batch(step, global_sequences, split)
        return self.read(batch, first, count)

    def read(self, batch: GlobalBatch, first: int, count: int) -> Tokens:
        """The tokens of a slice of a batch."""
        S, D = self.seq_len, self.depths
        # One sentinel value marks what lies behind the stream's end.
        windows = np.full((count, S + 1 + D), IGNORED, dtype=np.int64)
        for row, sample in zip(windows, batch.sample_ids[first : first + count]):
            if sample >= 0:
                tokens = self.dataset.tokens(batch.split, int(sample) * S, S + 1 + D)
                row[: len(tokens)] = tokens
        ids = windows[:, :S]
        labels = np.stack([windows[:, 1 + d : 1 + d + S] for d in range(D + 1)])
        return Tokens(ids=np.where(ids < 0, self.dataset.eos_id, ids), labels=labels)

    def fingerprint(self) -> dict[str, str | int]:
        """What a checkpoint keeps of the loader: with the step, all that determines the batches."""
        return {
            "data_sha256": self.dataset.data_sha256,
            "tokenizer_sha256": self.dataset.tokenizer_sha256,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "depths": self.depths,
            "first_step": self.first_step,
            "first_sample": self.first_sample,
        }

    def require(self, fingerprint: dict[str, str | int]) -> None:
        """Raises DataError naming the first field in which a checkpoint's fingerprint differs."""
        for field, ours in self.fingerprint().items():
            # Checkpoints from before runs had phases know of no first step.
            theirs = fingerprint.get(field, 0 if field.startswith("first_") else None)
            if theirs != ours:
                raise DataError(
                    f"{field} is {_short(ours)} and the checkpoint was trained with "
                    f"{_short(theirs)}",
                    hint="resume with the same data, seed, sequence length and phases before, or "
                    "start a new run with train.init_from",
                )

    def _key(self, epoch: int) -> str:
        return f"{self.dataset.data_sha256}/{self.seed}/{self.seq_len}/{epoch}"


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
