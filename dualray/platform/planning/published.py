"""What DeepSeek published about its own training, and ours beside it.

Table 4 of arXiv 2505.09343 times one step on 2048 H800. Its rows add up to the step: each is the
time that a rank spends in all its actions of a kind. 15360 sequences on 128 data-parallel ranks
(2 replicas of 64 expert ranks) are 120 micro-batches of one sequence, 60 from either end of 16
stages. By DualPipe's phases a rank r from its end then runs 23-r forwards alone ("1F": 1.13 s is
58 ms each in the mean), 23-r backwards alone, of which 15-r leave their weight gradients to 15-r
actions of their own ("1B", "1W"), and 97+r pairs ("1F1B": 13.95 s is 139 ms each); the two ranks
in the middle split one pair. Whether the table shows the mean or one rank is not said; ours are
means. The bubble is the rest, what a rank waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualray.platform.planning.estimate import OVERLAPPED, Estimate
from dualray.platform.planning.layouts import exists, planned
from dualray.platform.planning.precision import FP8
from dualray.platform.planning.setting import Candidate, Setting
from dualray.platform.preset import load_model
from dualray.schedule.actions import Kind

# arXiv 2412.19437, section 3.2 and 4.2: 2048 H800 train on 15360 sequences of 4096 tokens a step.
MODEL = "deepseek-v3"
PIPELINE = 16
EXPERTS = 64
SCHEDULE = "dualpipe"
NUM_SEQUENCES = 15360
SEQ_LEN = 4096
PROFILE = "h800"
NUM_GPUS = 2048

STEP_S = 19.926
BUBBLE_S = 2.06
GPU_HOURS_PER_TRILLION = 180e3
TOKENS_PER_S_PER_GPU = 1543


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of ours beside the published one."""

    name: str
    unit: str
    ours: float
    published: float

    @property
    def deviation(self) -> float:
        """Ours over theirs, less one."""
        return self.ours / self.published - 1


def report_candidate(setting: Setting) -> Candidate | str:
    """The report's layout on this cluster with as many replicas as there is room for, or why it
    does not exist: pipeline, expert ranks, schedule and micro-batches of one sequence are its."""
    model, gpus = setting.model, setting.cluster.num_gpus
    replicas, rest = divmod(gpus, PIPELINE * EXPERTS)
    if rest or not replicas:
        return f"{gpus} GPUs are no multiple of {PIPELINE} pipeline x {EXPERTS} expert ranks"
    if model.n_routed_experts % EXPERTS:
        return f"{EXPERTS} expert ranks do not divide {model.n_routed_experts} experts"
    micro_batches, rest = divmod(setting.num_sequences, replicas * EXPERTS)
    if rest:
        return f"{replicas * EXPERTS} ranks do not divide {setting.num_sequences} sequences"
    candidate = Candidate(
        pipeline=PIPELINE,
        experts=EXPERTS,
        replicas=replicas,
        schedule=SCHEDULE,
        micro_batch_size=1,
        micro_batches=micro_batches,
    )
    if not exists(setting, candidate):
        return (
            f"{SCHEDULE} over {PIPELINE} ranks does not exist for {model.num_hidden_layers} layers "
            f"and {micro_batches} micro-batches"
        )
    if not planned(setting, candidate).is_within(setting):
        return f"it does not fit into the memory of {setting.cluster.hardware.title}"
    return candidate


def is_published(setting: Setting, estimate: Estimate) -> bool:
    """Whether this very step was timed by DeepSeek."""
    candidate = estimate.candidate
    return (
        setting.model == load_model(MODEL)
        and setting.precision == FP8
        and setting.cluster.spec == f"{PROFILE}x{NUM_GPUS}"
        and (setting.num_sequences, setting.seq_len) == (NUM_SEQUENCES, SEQ_LEN)
        and (candidate.pipeline, candidate.experts) == (PIPELINE, EXPERTS)
        and candidate.schedule == SCHEDULE
    )


def compare(estimate: Estimate) -> tuple[Comparison, ...]:
    """Every published figure."""
    phases = estimate.phases_s
    backwards = phases[Kind.BACKWARD] + phases[Kind.INPUT_GRAD]
    seconds = {
        "step": (estimate.step_s, STEP_S),
        "bubble": (estimate.bubble_s, BUBBLE_S),
        "forwards alone (1F)": (phases[Kind.FORWARD], 1.13),
        "backwards alone (1B)": (backwards, 1.99),
        "weight gradients (1W)": (phases[Kind.WEIGHT_GRAD], 0.48),
        "overlapped pairs (1F1B)": (phases[OVERLAPPED], 13.95),
        "optimizer": (estimate.fit.optimizer_s, 0.29),
    }
    rest = (
        ("bubble, of a step", "%", 100 * estimate.bubble_fraction, 100 * BUBBLE_S / STEP_S),
        ("tokens/s a GPU", "", estimate.tokens_per_s_per_gpu, TOKENS_PER_S_PER_GPU),
        (
            "GPU hours a trillion tokens",
            "k",
            estimate.gpu_hours_per_trillion / 1e3,
            GPU_HOURS_PER_TRILLION / 1e3,
        ),
        ("days a trillion tokens", "", estimate.days_per_trillion, 3.7),
        ("model FLOPs utilization, causal", "%", 100 * estimate.utilization, 38.94),
    )
    return (
        *(
            Comparison(name=name, unit="s", ours=ours, published=published)
            for name, (ours, published) in seconds.items()
        ),
        *(
            Comparison(name=name, unit=unit, ours=ours, published=published)
            for name, unit, ours, published in rest
        ),
    )
