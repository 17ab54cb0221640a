"""What a run says about itself: optimizer steps, and events between them.

`platform/metrics_log.py` writes them into `metrics.jsonl` and reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, summed or averaged over the whole global batch."""

    step: int
    """Optimizer steps done, counted from 1."""
    tokens: int
    """Tokens trained on since the start of the run, cumulative."""
    seq_len: int | None = None
    """Tokens per sequence of the step; None in files from before runs had phases."""
    loss: float
    """Main cross-entropy, nats per token."""
    mtp_loss: Sequence[float] = ()
    """Cross-entropy of each multi-token-prediction depth, nats per token."""
    balance_loss: float = 0.0
    """Sequence-wise and auxiliary balance losses after their weights, nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the step."""
    tokens_per_s: float
    """Tokens per second over all workers."""
    step_time_s: float
    """Wall-clock seconds of the step."""
    bubble: float = 0.0
    """Measured idle fraction of the pipeline, 0 to 1."""
    bubble_simulated: float | None = None
    """Idle fraction of the schedule simulated with the step's own costs; only on traced steps."""
    exposed_communication: float = 0.0
    """Fraction of the same time in which workers waited for expert exchanges with nothing to
    compute, 0 to 1."""
    max_vio: float | None = None
    """Largest MaxVio (max load / mean load - 1, arXiv 2408.15664) of the step over the MoE layers;
    None without experts. The loads themselves are in loads/."""
    max_vio_per_layer: Mapping[int, float] = field(default_factory=dict)
    """MaxVio of the step in each MoE layer."""
    max_vio_run: float | None = None
    """Largest MaxVio over the MoE layers of the loads summed over the run up to this step; None
    without experts. Where loads/ lacks the run's first steps, over those that it has."""
    max_vio_run_per_layer: Mapping[int, float] = field(default_factory=dict)
    """The same of each MoE layer."""
    rank_imbalance: float | None = None
    """Rows of the fullest expert rank over the mean, worst layer; None on a single expert rank."""
    expert_s: float | None = None
    """Seconds that the slowest worker computed in forwards of its routed experts."""
    expert_s_mean: float | None = None
    """The same, averaged over the workers."""
    cross_node_bytes_per_token: float | None = None
    """What dispatches sent between nodes in forwards and backwards, over the tokens of the step;
    None where the expert ranks of a stage are on one node."""
    heldout_loss: float | None = None
    """Held-out cross-entropy, nats per token; only on evaluation steps."""
    heldout_bits_per_byte: float | None = None
    """Held-out cross-entropy, bits per byte of text; only on evaluation steps."""


@dataclass(frozen=True, kw_only=True)
class Yardsticks:
    """Bits per byte that simple compressors and models reach on the same held-out text."""

    event: ClassVar[str] = "yardsticks"

    gzip: float
    bzip2: float
    unigram: float
    bigram: float


@dataclass(frozen=True, kw_only=True)
class PhaseEntered:
    """The run went on with other sequences and another learning rate."""

    event: ClassVar[str] = "phase"

    step: int
    """First optimizer step of the phase, counted from 1."""
    seq_len: int
    """Tokens per sequence from here on."""
    context: int
    """Longest sequence in tokens that the model takes from here on."""
    lr: float
    """Peak learning rate of the phase."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """The scheduler looked at measured costs and decided how to go on."""

    event: ClassVar[str] = "decided"

    step: int
    """Optimizer steps done by then."""
    schedule: str
    layers: Sequence[int]
    """Layers of each stage."""
    micro_batch_size: int
    """Sequences of a micro-batch."""
    micro_batches: int
    """Micro-batches of each (replica, expert rank)."""
    step_time_s_before: float
    """Simulated seconds of a step as it was until then."""
    step_time_s: float
    """Simulated seconds of a step from then on."""
    reason: str
    """Why, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class ExpertsMoved:
    """Experts live elsewhere from now on."""

    event: ClassVar[str] = "experts_moved"

    step: int
    """Optimizer steps done by then."""
    layers: Sequence[int]
    """MoE layers that changed."""
    imbalance_before: float
    """Foreseen time of the slowest expert rank over a perfect spread, worst layer, had they
    stayed."""
    imbalance_after: float
    """The same where they live now."""
    num_bytes: int
    """Weights and optimizer state that workers received, all together."""
    seconds: float
    """How long it took."""
    reason: str
    """Why, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint was committed."""

    event: ClassVar[str] = "checkpoint"

    step: int
    """Optimizer steps that the checkpoint holds."""
    seconds: float
    """Wall-clock seconds from the first write to the commit."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The workers turned to serving."""

    event: ClassVar[str] = "switch"

    seconds_to_first_token: float
    """Seconds from the end of the last optimizer step to the first served token; behind a pause,
    from the end of the pause."""
    workers_before: Sequence[int]
    """Process ids of the workers before, by rank."""
    workers_after: Sequence[int]
    """Process ids of the workers in serving, by rank."""
    step: int | None = None
    """Optimizer steps done by then; None in files from before runs could switch back."""
    switch_s: float | None = None
    """Seconds of them that the switch itself took, without the evaluation and the checkpoint that
    may follow the last step."""
    came_from: str = "train"
    """The mode before: train or pause; start if no step of this process preceded."""
    optimizer: str | None = None
    """What became of optimizer state: keep, park or drop."""
    kept_bytes: Sequence[int] = ()
    """Masters and moments that stay where training uses them, by rank."""
    parked_bytes: Sequence[int] = ()
    """Masters and moments in host memory, by rank."""
    dropped_bytes: Sequence[int] = ()
    """Masters and moments that were forgotten, by rank."""
    gradient_bytes: Sequence[int] = ()
    """Gradient buffers that were given back with what was parked or dropped, by rank."""
    cache_bytes: Sequence[int] = ()
    """Latent cache, by rank."""


@dataclass(frozen=True, kw_only=True)
class BackToTraining:
    """The workers went on training."""

    event: ClassVar[str] = "back_to_training"

    step: int
    """The first optimizer step since, counted from 1."""
    seconds_to_first_step: float
    """Seconds from when the workers were free to the end of that step."""
    came_from: str
    """The mode before: serve or pause."""
    optimizer: str
    """Where optimizer state came from: keep, park or drop."""
    drain_s: float = 0.0
    """Seconds in which accepted requests ended."""
    num_cut: int = 0
    """Accepted requests that did not end in time."""


@dataclass(frozen=True, kw_only=True)
class Paused:
    """The workers neither train nor serve from now on."""

    event: ClassVar[str] = "paused"

    step: int
    """Optimizer steps done by then."""
    came_from: str
    """The mode before: train or serve."""
    drain_s: float = 0.0
    """Seconds in which accepted requests ended."""
    num_cut: int = 0
    """Accepted requests that did not end in time."""


ModeChange = Switch | BackToTraining | Paused
Line = (
    StepMetrics | Yardsticks | PhaseEntered | Decided | ExpertsMoved | CheckpointSaved | ModeChange
)
EVENTS = {
    cls.event: cls
    for cls in (
        *(Yardsticks, PhaseEntered, Decided, ExpertsMoved, CheckpointSaved),
        *(Switch, BackToTraining, Paused),
    )
}


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """Everything that a metrics file says; of repeated events the last one counts."""

    steps: tuple[StepMetrics, ...] = ()
    phases: tuple[PhaseEntered, ...] = ()
    decisions: tuple[Decided, ...] = ()
    migrations: tuple[ExpertsMoved, ...] = ()
    checkpoints: tuple[CheckpointSaved, ...] = ()
    yardsticks: Yardsticks | None = None
    mode_changes: tuple[ModeChange, ...] = ()
    """In their order."""

    @property
    def switch(self) -> Switch | None:
        """The last time that training turned to serving."""
        found = [c for c in self.mode_changes if isinstance(c, Switch) and c.came_from == "train"]
        return found[-1] if found else None
