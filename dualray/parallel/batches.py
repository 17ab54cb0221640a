"""A worker's slice of the step's samples.

Samples of a step are ordered by replica, expert rank, direction of entry, index, whatever the
layout, so that every layout with the same number of sequences per step trains on the same
ones. D MTP depths, S sequence length, b sequences per micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dualray.parallel.layout import Coordinate, Layout
from dualray.parallel.micro_batch import MicroBatch
from dualray.parallel.train_config import TrainConfig
from dualray.schedule.actions import Schedule


class Tokens(Protocol):
    """ids (b, S) and labels (1 + D, b, S), int64."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...


class TokenSource(Protocol):
    """Batches as a pure function of the step; `dualray.data.loader.Loader` is one."""

    def sequences(
        self, step: int, first: int, count: int, global_sequences: int, split: str = "train"
    ) -> Tokens:
        """Sequences [first, first + count) of the `global_sequences` of step `step`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """Cuts one worker's micro-batches out of a step."""

    layout: Layout
    schedule: Schedule
    train: TrainConfig
    at: Coordinate
    device: torch.device

    def micro_batches(
        self, source: TokenSource, step: int, split: str = "train"
    ) -> dict[tuple[int, int], MicroBatch]:
        """Every micro-batch of this worker by (direction, index).

        Ids are read where the direction enters and labels where it ends; a worker between
        the two reads neither.
        """
        size = self.train.micro_batch_size
        total = self.train.global_sequences(self.layout)
        first = (self.at.replica * self.layout.experts + self.at.expert) * self.train.micro_batches
        positions = torch.arange(self.train.seq_len, device=self.device).repeat(size)
        batches = {}
        for direction in range(self.schedule.num_directions):
            enters = self.schedule.upstream(self.at.pipeline, direction) is None
            ends = self.schedule.downstream(self.at.pipeline, direction) is None
            for index in range(self.schedule.micro_batches_of(direction)):
                ids = labels = None
                if enters or ends:
                    entry = self.schedule.entry_of(direction)
                    number = first + entry * self.schedule.micro_batches_of(0) + index
                    tokens = source.sequences(step, number * size, size, total, split)
                    ids = torch.from_numpy(tokens.ids).flatten().to(self.device)
                    labels = torch.from_numpy(tokens.labels).flatten(1).to(self.device)
                batches[direction, index] = MicroBatch(
                    positions_T=positions,
                    seq_lens=(self.train.seq_len,) * size,
                    ids_T=ids if enters else None,
                    labels_DT=labels if ends else None,
                )
        return batches
