"""A small training run in real processes, over made-up tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dualray.data.loader import IGNORED
from dualray.model.config import ModelConfig
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.groups import Rendezvous
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement, contiguous_placement
from dualray.parallel.train_config import TrainConfig
from dualray.parallel.trainer import Trainer


@dataclass(frozen=True)
class Window:
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class SkewedTokens:
    """A `TokenSource`: few ids are frequent, so that there is something to learn and to balance.

    Sequences end in up to three masked targets, so that workers count different numbers of them.
    """

    vocab_size: int
    seq_len: int
    depths: int

    def sequences(
        self, step: int, first: int, count: int, global_sequences: int, split: str = "train"
    ) -> Window:
        rows = []
        for number in range(first, first + count):
            key = [step, number, 1 if split == "train" else 2]
            draws = np.random.default_rng(key).random(self.seq_len + 1 + self.depths)
            rows.append((draws**3 * self.vocab_size).astype(np.int64))
        window = np.stack(rows)
        labels = np.stack([window[:, d + 1 : d + 1 + self.seq_len] for d in range(self.depths + 1)])
        for row, number in enumerate(range(first, first + count)):
            for depth in range(self.depths + 1):
                labels[depth, row, self.seq_len - depth - number % 4 :] = IGNORED
        return Window(ids=window[:, : self.seq_len], labels=labels)


def tokens_for(model: ModelConfig, train: TrainConfig) -> SkewedTokens:
    return SkewedTokens(model.vocab_size, train.seq_len, model.num_nextn_predict_layers)


def make_trainer(
    rank: int,
    model: ModelConfig,
    layout: Layout,
    train: TrainConfig,
    port: int,
    *,
    first_step: int = 0,
    placement: ExpertPlacement | None = None,
    nodes: NodeMap | None = None,
    experts: ExpertsConfig | None = None,
) -> Trainer:
    return Trainer(
        model=model,
        layout=layout,
        train=train,
        placement=placement or contiguous_placement(model, layout.experts),
        rank=rank,
        rendezvous=Rendezvous(host="127.0.0.1", port=port, timeout_s=60),
        seed=5,
        device=torch.device("cpu"),
        first_step=first_step,
        nodes=nodes,
        experts=experts,
    )
