"""Section `train` of a run file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualray.errors import ConfigError
from dualray.parallel.layout import Layout
from dualray.parallel.lr import LrConfig
from dualray.parallel.optimizer import OptimizerConfig

_AT_LEAST_ONE = (
    "seq_len micro_batch_size micro_batches eval_batches keep_checkpoints log_every".split()
)
_NOT_NEGATIVE = (
    "steps clip_norm gamma alpha mtp_lambda eval_every checkpoint_every trace_every".split()
)

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what batches, and with which optimizer a run trains.

    One step trains on replicas x experts x micro_batches x micro_batch_size sequences of
    seq_len tokens.
    """

    steps: int
    """Optimizer steps, those of section `extend` not counted; 0 where a run does nothing but
    extend train.init_from."""
    seq_len: int
    """Tokens per sequence; at most model.max_position_embeddings."""
    micro_batch_size: int = 1
    """Sequences per micro-batch."""
    micro_batches: int = 4
    """Micro-batches per step of each (replica, expert rank); DualPipe wants an even number of
    at least 2 x layout.pipeline, half of which enter at either end."""
    dtype: str = "float32"
    """Weights and activations: float32, bfloat16 (fp32 masters and gradients) or float64."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; a tenth of `lr` if unset."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    optimizer: str = "zero1"
    """`zero1` (DeepSpeed, states cut over the copies of a parameter) or `adamw`."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on 1-D parameters."""
    clip_norm: float = 1.0
    """Bound of the global gradient norm; 0 switches clipping off."""
    gamma: float = 0.001
    """Step of the router biases towards balance (arXiv 2412.19437, 2.1.2); 0 freezes them."""
    alpha: float = 1e-4
    """Weight of the sequence-wise balance loss; 0 switches it off."""
    mtp_lambda: float = 0.3
    """Weight of the multi-token-prediction losses, divided over their depths."""
    eval_every: int = 0
    """Steps between held-out losses; 0 evaluates only after the last step."""
    eval_batches: int = 4
    """Global batches of held-out text per periodic evaluation; the last one reads all of it."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one after the last step and on an interrupt."""
    keep_checkpoints: int = 3
    """Newest checkpoints that stay."""
    trace_every: int = 0
    """Steps between timelines, each of which replaces trace.json; besides these, or with 0 alone,
    steps with a held-out loss have one."""
    init_from: str | None = None
    """Checkpoint folder whose weights a new run starts from (optimizer and data start anew)."""
    overlap: bool = True
    """Let a forward and another micro-batch's backward take turns while rows travel between expert
    ranks, where the schedule pairs them; False runs every pair one after the other."""
    recompute: bool = False
    """Forget RMSNorms and MLA's up-projections in the forward and make them again in the backward
    (arXiv 2412.19437, 3.2.3): less memory, a few percent more time, the same bits."""
    log_every: int = 1
    """Steps between printed lines when the output is no terminal; every step is recorded."""

    def __post_init__(self) -> None:
        for field in _AT_LEAST_ONE:
            self._at_least(field, 1)
        for field in _NOT_NEGATIVE:
            self._at_least(field, 0)
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"train.dtype is {self.dtype} and must be one of {', '.join(DTYPES)}",
                hint="set train.dtype to float32",
            )
        if self.steps:
            self.learning_rate()
        self.optimizer_config()

    def _at_least(self, field: str, bound: int) -> None:
        if not bound <= getattr(self, field) < math.inf:
            raise ConfigError(
                f"train.{field} is {getattr(self, field)} and must be at least {bound}",
                hint=f"set train.{field} to {bound} or more",
            )

    def global_sequences(self, layout: Layout) -> int:
        """Sequences of one optimizer step over all workers."""
        workers = layout.replicas * layout.experts
        return workers * self.micro_batches * self.micro_batch_size

    def learning_rate(self) -> LrConfig:
        return LrConfig(
            lr=self.lr,
            min_lr=self.lr / 10 if self.min_lr is None else self.min_lr,
            warmup_steps=self.warmup_steps,
            steps=self.steps,
        )

    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(
            kind=self.optimizer,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
