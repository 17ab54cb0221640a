"""What a choice fills of a worker's memory, by the planner's formulas."""

from __future__ import annotations

from dualray.platform.planning.holding import Held, copies, held_by_stage, shard
from dualray.platform.planning.memory import RESERVED_SHARE, activation_bytes
from dualray.platform.planning.precision import PRECISIONS
from dualray.platform.planning.setting import Candidate
from dualray.platform.scheduling.choice import Choice, Situation
from dualray.schedule.actions import Schedule
from dualray.schedule.memory import peaks_of


def worker_bytes(choice: Choice, situation: Situation, schedule: Schedule) -> float:
    """Weights, gradients, optimizer shard and activations of the fullest worker, and a reserve.

    float64 is counted as twice float32.
    """
    layout, model = situation.layout, situation.model
    wide = situation.dtype == "float64"
    precision = PRECISIONS["float32" if wide else situation.dtype]
    candidate = Candidate(
        pipeline=layout.pipeline,
        experts=layout.experts,
        replicas=layout.replicas,
        schedule=choice.schedule,
        micro_batch_size=choice.micro_batch_size,
        micro_batches=choice.micro_batches,
        layers_per_stage=choice.layers,
    )
    held = held_by_stage(model, candidate, schedule)
    tokens = choice.micro_batch_size * situation.seq_len
    kept = [
        planned + precision.activation_bytes * tokens * layers * _kept_besides(situation)
        for planned, layers in zip(
            activation_bytes(model, precision, choice.layers, tokens), choice.layers
        )
    ]
    peaks, shared = peaks_of(schedule.steps), copies(candidate, schedule)
    fullest = 0.0
    for pipeline_rank, stages in enumerate(schedule.stage_of):
        own = sum((held[stage] for stage in stages), start=Held())
        live = peaks.activations[pipeline_rank] + peaks.deferred[pipeline_rank]
        fullest = max(
            fullest,
            (precision.weight_bytes + precision.gradient_bytes) * own.total
            + precision.optimizer_bytes * shard(own, shared)
            + live * max(kept[stage] for stage in stages),
        )
    return fullest * (2 if wide else 1) / (1 - RESERVED_SHARE)


def _kept_besides(situation: Situation) -> int:
    """Values a token and layer that are kept here and that the planner's formula has made again:
    SwiGLU's output, and without `train.recompute` norms and heads."""
    model = situation.model
    used = model.num_experts_per_tok + model.n_shared_experts
    swiglu = max(model.moe_intermediate_size * used, model.intermediate_size)
    if situation.recompute:
        return swiglu
    heads = model.num_attention_heads * (2 * model.qk_head_dim + model.v_head_dim)
    return swiglu + 2 * model.hidden_size + heads
