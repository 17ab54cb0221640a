"""What `dualray bench rebalance` trains: a small MoE model whose routers are skewed on purpose.

Biases make every layer's router prefer a run of neighbouring experts, which contiguous placement
puts on the same rank, and which differ from layer to layer. Nothing moves the biases, so that only
where experts live can even the ranks out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dualray.model.config import ModelConfig
from dualray.model.router import Router
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig

EXPERT_RANKS = 4
SLOW_RANK = 1
"""In the setting with unequal ranks."""


@dataclass(frozen=True, kw_only=True)
class RebalanceCase:
    """One model, how it trains, and how often that is repeated."""

    hidden_size: int = 256
    moe_intermediate_size: int = 256
    n_routed_experts: int = 32
    num_experts_per_tok: int = 4
    num_hidden_layers: int = 2
    skew: float = 0.06
    """Router biases go from this to its negative; scores lie about as far from one half."""
    lr: float = 1e-4
    """Lower than such a model would take: with 3e-4 the routers alone change the loads by a tenth
    in as many steps as are measured."""
    seq_len: int = 16
    """Short, so that a step has many sequences and loads hardly differ from step to step."""
    sequences: int = 64
    """Per micro-batch."""
    micro_batches: int = 2
    steps_per_look: int = 5
    """Every training takes twice as many: before the balancer looks, and behind that."""
    slowness: int = 2
    """So many times the slow rank computes what its experts have to."""
    rounds: int = 3
    """In each, with weights of its own, every setting is trained once."""

    @property
    def steps(self) -> int:
        """Of one training."""
        return 2 * self.steps_per_look

    @property
    def redundant(self) -> int:
        """A quarter more slots than experts."""
        return self.n_routed_experts // 4

    @property
    def rows(self) -> int:
        """That the experts of one layer are sent in a step, on all ranks together."""
        tokens = EXPERT_RANKS * self.micro_batches * self.sequences * self.seq_len
        return tokens * self.num_experts_per_tok

    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=512,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size,
            moe_intermediate_size=self.moe_intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=self.n_routed_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            first_k_dense_replace=0,
            max_position_embeddings=self.seq_len,
            initializer_range=0.02,
        )

    def train(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            seq_len=self.seq_len,
            micro_batch_size=self.sequences,
            micro_batches=self.micro_batches,
            lr=self.lr,
            optimizer="adamw",
            balance="none",
        )

    def experts(self) -> ExpertsConfig:
        """A quarter more slots, and a look in the middle of a training."""
        return ExpertsConfig(redundant=self.redundant, rebalance_every=self.steps_per_look)


FULL = RebalanceCase()
QUICK = RebalanceCase(
    hidden_size=64,
    moe_intermediate_size=64,
    n_routed_experts=16,
    sequences=32,
    steps_per_look=3,
    rounds=1,
)


def layout() -> Layout:
    return Layout(pipeline=1, experts=EXPERT_RANKS, schedule="1f1b")


@torch.no_grad()
def skew_routers(routers: Sequence[Router], skew: float) -> None:
    """Prefer other experts in every layer: those in front, then those in the middle, and so on."""
    for number, router in enumerate(routers):
        bias_E = router.e_score_correction_bias
        experts = len(bias_E)
        falling_E = torch.linspace(skew, -skew, experts, dtype=bias_E.dtype)
        bias_E.copy_(falling_E.roll(number * experts // len(routers)))


@dataclass(frozen=True)
class Window:
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class MadeUpTokens:
    """A `TokenSource`: ids of which the low ones are frequent, so that there is something to
    learn."""

    vocab_size: int
    seq_len: int

    def sequences(
        self, step: int, first: int, count: int, global_sequences: int, split: str = "train"
    ) -> Window:
        draws = [
            np.random.default_rng([step, number]).random(self.seq_len + 1)
            for number in range(first, first + count)
        ]
        windows = (np.stack(draws) ** 2 * self.vocab_size).astype(np.int64)
        return Window(ids=windows[:, :-1], labels=windows[None, :, 1:])


def config_dict(case: RebalanceCase) -> dict[str, Any]:
    """What was measured, for the record."""
    return asdict(case) | {
        "expert_ranks": EXPERT_RANKS,
        "slow_rank": SLOW_RANK,
        "redundant": case.redundant,
        "rows": case.rows,
        "dtype": case.train().dtype,
        "threads_per_rank": 1,
    }
