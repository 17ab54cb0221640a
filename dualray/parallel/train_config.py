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
    "steps clip_norm gamma gamma_steps alpha aux_alpha mtp_lambda eval_every checkpoint_every "
    "trace_every".split()
)

DTYPES = ("float32", "bfloat16", "float64")

BALANCES = ("bias", "none", "aux_loss", "aux_loss_and_bias")
"""Ways to keep experts evenly loaded; the other three are there to be compared with `bias`."""

DEFAULT_AUX_ALPHA = 0.001
"""arXiv 2408.15664 chose it for its own auxiliary-loss peer, whose f_i is scaled as ours: of the
weights tried there the one that balances without costing much loss."""


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
    balance: str = "bias"
    """How experts are kept evenly loaded: `bias` (router biases move by `gamma`, beside the
    sequence-wise loss of weight `alpha`, as in DeepSeek-V3), `aux_loss` (a loss of weight
    `aux_alpha` alone), `aux_loss_and_bias` (all three) or `none` (none of them)."""
    gamma: float = 0.001
    """Step of the router biases towards balance (arXiv 2412.19437, 2.1.2); 0 freezes them. Counts
    where `balance` is `bias` or `aux_loss_and_bias`; else biases stay as they are."""
    gamma_steps: int | None = None
    """Optimizer steps of the run, section `extend` included, after which gamma is 0 (V3: 14.3T of
    14.8T tokens); None lets biases move to the end."""
    alpha: float = 1e-4
    """Weight of the sequence-wise balance loss; 0 switches it off. Counts where biases move
    (`bias`, `aux_loss_and_bias`), which it complements; there is none with `aux_loss` or `none`."""
    aux_alpha: float | None = None
    """Weight of the auxiliary loss over all tokens of a micro-batch, sum_i f_i P_i (arXiv
    2101.03961, 2.2, with sigmoid scores normalised over the experts), where `balance` is
    `aux_loss` or `aux_loss_and_bias`; None takes 0.001 there."""
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
        self._check_balance()
        if self.steps:
            self.learning_rate()
        self.optimizer_config()

    def _check_balance(self) -> None:
        if self.balance not in BALANCES:
            raise ConfigError(
                f"train.balance is {self.balance} and must be one of {', '.join(BALANCES)}",
                hint="set train.balance to bias",
            )
        if self.aux_alpha is not None and not self.has_aux_loss:
            raise ConfigError(
                f"train.aux_alpha is {self.aux_alpha} and train.balance {self.balance} has no "
                "auxiliary loss",
                hint="remove train.aux_alpha, or set train.balance to aux_loss",
            )
        if self.gamma_steps is not None and not self.moves_biases:
            raise ConfigError(
                f"train.gamma_steps is {self.gamma_steps} and train.balance {self.balance} moves "
                "no biases",
                hint="remove train.gamma_steps, or set train.balance to bias",
            )

    @property
    def moves_biases(self) -> bool:
        return self.balance in ("bias", "aux_loss_and_bias")

    @property
    def has_aux_loss(self) -> bool:
        return self.balance in ("aux_loss", "aux_loss_and_bias")

    def gamma_at(self, step: int) -> float:
        """By how much biases move behind step `step` of the run, counted from 0."""
        over = self.gamma_steps is not None and step >= self.gamma_steps
        return self.gamma if self.moves_biases and not over else 0.0

    def sequence_loss_weight(self) -> float:
        """Of the sequence-wise balance loss, summed over sequences over their number."""
        return self.alpha if self.moves_biases else 0.0

    def aux_loss_weight(self) -> float:
        """Of the auxiliary loss, summed over micro-batches over their number."""
        if not self.has_aux_loss:
            return 0.0
        return DEFAULT_AUX_ALPHA if self.aux_alpha is None else self.aux_alpha

    def _at_least(self, field: str, bound: int) -> None:
        value = getattr(self, field)
        if value is not None and not bound <= value < math.inf:
            raise ConfigError(
                f"train.{field} is {getattr(self, field)} and must be at least {bound}",
                hint=f"set train.{field} to {bound} or more",
            )

    def global_sequences(self, layout: Layout) -> int:
        """Sequences of one optimizer step over all workers."""
        return self.global_micro_batches(layout) * self.micro_batch_size

    def global_micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one optimizer step over all workers."""
        return layout.replicas * layout.experts * self.micro_batches

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
