"""Training tokens/s of the one-process model against Hugging Face's DeepseekV3.

Both start from the same weights and train on the same batch with the same recipe: main
cross-entropy only (Hugging Face trains no MTP module and no balance loss), clipping by the
global norm, AdamW. Steps alternate, ours and theirs, so that a machine that slows down
slows both; the ratio is taken pair by pair. Before anything is timed the first losses of
both must agree, in fp32 also those after one optimizer step: a faster step that computes
something else is no speed-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dualray.errors import RunError
from dualray.model.config import ModelConfig
from dualray.model.moe import LocalDispatch
from dualray.parallel.adamw import AdamW
from dualray.parallel.executor import Executor
from dualray.parallel.held import HeldStages
from dualray.parallel.layout import Coordinate
from dualray.parallel.micro_batch import MicroBatch, Objective
from dualray.parallel.optimizer import OptimizerConfig, ParamGroup
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.weight_grads import WeightGrads, attach_main_grads
from dualray.platform.bench.hugging_face import HuggingFaceTrainer
from dualray.schedule.baselines import one_f_one_b

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""In nats. fp32 differs by the order of sums; bf16 rounds activations at different places."""

SECOND_LOSS_TOLERANCE = {"fp32": 1e-3}
"""After one step. Adam magnifies rounding where gradients are tiny; bf16 has no such check
because the peer's moments and weights are rounded and ours are not."""

LR = 3e-4
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step trains on."""

    model: ModelConfig
    """Architecture of both sides; no MTP modules."""
    batch_size: int
    """Sequences per step."""
    seq_len: int
    """Tokens per sequence."""

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


FULL = Workload(
    model=ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        max_position_embeddings=1024,
        initializer_range=0.02,
    ),
    batch_size=8,
    seq_len=512,
)
"""18M parameters, head widths in DeepSeek-V3's proportions; 4096 tokens a step."""

QUICK = Workload(
    model=ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        max_position_embeddings=128,
        initializer_range=0.02,
    ),
    batch_size=4,
    seq_len=128,
)
"""Seconds instead of minutes; overheads weigh more than in `FULL`."""


class Trainer(Protocol):
    """One side of the comparison."""

    name: str

    def step(self, ids_BS: Tensor, labels_BS: Tensor) -> float:
        """One optimizer step; returns the mean loss in nats before it."""
        ...


class DualrayTrainer:
    """What one worker of a 1 x 1 layout does in a step, without any process group."""

    name = "dualray"

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, optimizer: OptimizerConfig, seed: int = 0
    ) -> None:
        self._schedule = one_f_one_b(1, 1)
        held = HeldStages(
            config,
            self._schedule,
            Coordinate(replica=0, pipeline=0, expert=0),
            contiguous_placement(config, 1),
            seed=seed,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        self.stage = held.stages[0]
        self._optimizer = AdamW(_param_groups(held), optimizer)
        self._executor = Executor(
            held,
            0,
            PipelineLinks({}, (0,)),
            [LocalDispatch(config.n_routed_experts)],
            WeightGrads(),
        )

    def step(self, ids_BS: Tensor, labels_BS: Tensor, lr: float = LR) -> float:
        """One optimizer step; returns the mean loss in nats before it."""
        sequences, length = ids_BS.shape
        batch = MicroBatch(
            positions_T=torch.arange(length).repeat(sequences),
            seq_lens=(length,) * sequences,
            ids_T=ids_BS.flatten(),
            labels_DT=labels_BS.flatten()[None],
        )
        objective = Objective(main=1 / ids_BS.numel(), mtp=(), balance=0.0)
        sums = self._executor.run(self._schedule, {(0, 0): batch}, objective)
        norm = float(self._optimizer.squared_norm()) ** 0.5
        if norm > CLIP_NORM:
            self._optimizer.scale(CLIP_NORM / norm)
        self._optimizer.step(lr)
        return sums.main / ids_BS.numel()


def _param_groups(held: HeldStages) -> list[ParamGroup]:
    groups = []
    for params in (held.dense_parameters(), held.expert_parameters()):
        attach_main_grads(params.values())
        groups.append(ParamGroup(params=list(params.items()), process_group=None, group_ranks=(0,)))
    return groups


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of every measured step of both sides, pair by pair, and their losses in nats."""

    dtype: str
    tokens: int
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]
    first_loss: tuple[float, float]
    last_loss: tuple[float, float]

    @property
    def ratio(self) -> float:
        """How many times our training speed theirs is exceeded by: median over the pairs."""
        return statistics.median(self._ratios())

    def _ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s)]

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of one dtype; seconds per step, tokens per second."""
        result: dict[str, Any] = {"dtype": self.dtype}
        for side, times in enumerate((self.ours_s, self.theirs_s)):
            median = statistics.median(times)
            result[("dualray", "hugging_face")[side]] = {
                "median_step_s": median,
                "tokens_per_s": self.tokens / median,
                "first_loss": self.first_loss[side],
                "last_loss": self.last_loss[side],
            }
        ratios = self._ratios()
        return result | {
            "ratio": self.ratio,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "pairs": len(ratios),
        }


def compare(
    workload: Workload,
    dtype: str,
    *,
    pairs: int,
    warmup: int,
    on_pair: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Train both sides in turn: `warmup` pairs of steps, at least 2, then `pairs` measured ones.

    `on_pair` hears how many pairs are done. Raises ConfigError without transformers and
    RunError if the losses of the two sides disagree.
    """
    optimizer = OptimizerConfig(kind="adamw")
    ours = DualrayTrainer(workload.model, DTYPES[dtype], optimizer)
    theirs = HuggingFaceTrainer(workload.model, ours.stage, optimizer, LR, CLIP_NORM)
    return measure(ours, theirs, workload, dtype, pairs=pairs, warmup=warmup, on_pair=on_pair)


def measure(
    ours: Trainer,
    theirs: Trainer,
    workload: Workload,
    dtype: str,
    *,
    pairs: int,
    warmup: int,
    on_pair: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """`compare` for two sides that exist already."""
    ids, labels = training_batch(workload)
    steps: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(max(warmup, 2) + pairs):
        steps.append((_timed(ours, ids, labels), _timed(theirs, ids, labels)))
        if number < 2:
            _check_losses(number, dtype, steps[-1][0][1], steps[-1][1][1])
        on_pair(number + 1)
    measured = steps[-pairs:]
    return Comparison(
        dtype=dtype,
        tokens=workload.tokens,
        ours_s=tuple(own[0] for own, _ in measured),
        theirs_s=tuple(other[0] for _, other in measured),
        first_loss=(steps[0][0][1], steps[0][1][1]),
        last_loss=(steps[-1][0][1], steps[-1][1][1]),
    )


def config_dict(workload: Workload, *, warmup: int) -> dict[str, Any]:
    """The workload as a record stores it."""
    return {
        "model": asdict(workload.model),
        "batch_size": workload.batch_size,
        "seq_len": workload.seq_len,
        "warmup": warmup,
        "hugging_face": {"attention": "sdpa", "experts": "grouped_mm"},
    }


def _timed(side: Trainer, ids: Tensor, labels: Tensor) -> tuple[float, float]:
    started = time.perf_counter()
    loss = side.step(ids, labels)
    return time.perf_counter() - started, loss


def training_batch(workload: Workload) -> tuple[Tensor, Tensor]:
    """ids and labels (B, S): windows of uniform random ids, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, workload.seq_len + 1)
    window = torch.randint(workload.model.vocab_size, shape, generator=generator)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _check_losses(number: int, dtype: str, ours: float, theirs: float) -> None:
    tolerance = (FIRST_LOSS_TOLERANCE, SECOND_LOSS_TOLERANCE)[number].get(dtype)
    if tolerance is None or abs(ours - theirs) <= tolerance:
        return
    raise RunError(
        f"the {dtype} loss of step {number} is {ours:.6f} in dualray and {theirs:.6f} in "
        f"Hugging Face's model of the same weights, and they may differ by {tolerance:g}",
        hint="find which of the two computes something else before comparing their speed",
    )
