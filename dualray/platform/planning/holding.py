"""Which parameters a pipeline rank holds, and what summing them over their copies takes."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.model.config import ModelConfig
from dualray.model.formulas import attention_biases, attention_projections
from dualray.platform.planning.hardware import Hardware
from dualray.platform.planning.kernels import TRAFFIC_SHARE
from dualray.platform.planning.precision import FP32_BYTES, Precision
from dualray.platform.planning.setting import Candidate
from dualray.schedule.actions import Schedule


@dataclass(frozen=True, kw_only=True)
class Held:
    """Parameters of one or several stages on one worker."""

    dense: int = 0
    """The same on all expert ranks."""
    routed: int = 0
    """Of the routed experts that this expert rank holds."""
    full_width: int = 0
    """Of the dense ones, those whose products stay in BF16: embedding, head and routers."""

    def __add__(self, other: Held) -> Held:
        return Held(
            dense=self.dense + other.dense,
            routed=self.routed + other.routed,
            full_width=self.full_width + other.full_width,
        )

    @property
    def total(self) -> int:
        return self.dense + self.routed


@dataclass(frozen=True, kw_only=True)
class Copies:
    """How many workers hold the same parameters, each with an equal shard of their states."""

    dense: int
    routed: int


def copies(candidate: Candidate, schedule: Schedule) -> Copies:
    """Copies of a parameter over mirrors, replicas and, if dense, expert ranks."""
    routed = candidate.replicas * (2 if is_mirrored(schedule) else 1)
    return Copies(dense=routed * candidate.experts, routed=routed)


def is_mirrored(schedule: Schedule) -> bool:
    """Whether two pipeline ranks hold each stage."""
    return sum(0 in stages for stages in schedule.stage_of) == 2


def held_by_stage(model: ModelConfig, candidate: Candidate, schedule: Schedule) -> list[Held]:
    """Parameters of each stage; the last one's copy of the embedding included."""
    stages, first = [], 0
    for count in candidate.layers_per_stage:
        layers = (_layer(model, model.is_moe(first + i), candidate.experts) for i in range(count))
        stages.append(sum(layers, start=Held()))
        first += count
    vocabulary = model.vocab_size * model.hidden_size
    table = Held(dense=vocabulary, full_width=vocabulary)
    stages[0] += table
    stages[-1] += Held(dense=model.hidden_size)
    if not model.tie_word_embeddings:
        stages[-1] += table
    for _ in range(model.num_nextn_predict_layers):
        # The projection of embedding and hidden state, their norms and the one before the head.
        joining = Held(dense=2 * model.hidden_size**2 + 3 * model.hidden_size)
        stages[-1] += _layer(model, True, candidate.experts) + joining
    ends_meet = any({0, schedule.num_stages - 1} <= set(each) for each in schedule.stage_of)
    if model.embedding_is_used_last and not ends_meet:
        stages[-1] += table
    return stages


def _layer(model: ModelConfig, is_moe: bool, num_ranks: int) -> Held:
    D, F = model.hidden_size, model.moe_intermediate_size
    attention = sum(out * into for out, into in attention_projections(model).values())
    norms = 2 * D + (model.q_lora_rank or 0) + (model.kv_lora_rank or 0)
    dense = attention + attention_biases(model) + norms
    if not is_moe:
        return Held(dense=dense + 3 * D * model.intermediate_size)
    router = model.n_routed_experts * D
    return Held(
        dense=dense + router + model.n_shared_experts * 3 * D * F,
        routed=model.n_routed_experts // num_ranks * 3 * D * F,
        full_width=router,
    )


def reduction_seconds(
    held: Held, copies: Copies, candidate: Candidate, hardware: Hardware, precision: Precision
) -> float:
    """Seconds in which gradients are summed and scattered over their copies (ZeRO-1) and updated
    weights gathered.

    Copies of dense parameters fill whole nodes, so all NICs of a node serve each ring, up to
    NVLink's rate; a node has one copy of a routed expert and sends it through one NIC.
    """
    ring = ring_bytes_per_s(candidate, hardware)
    exchanged = precision.gradient_bytes + precision.weight_bytes
    return exchanged * sum(
        parameters * (count - 1) / count / rate
        for parameters, count, rate in (
            (held.dense, copies.dense, ring),
            (held.routed, copies.routed, hardware.network_bytes_per_s),
        )
    )


def ring_bytes_per_s(candidate: Candidate, hardware: Hardware) -> float:
    """Rate at which each GPU passes on what is summed over the dense copies."""
    local = min(candidate.experts, hardware.gpus_per_node)
    return min(hardware.nvlink_bytes_per_s, local * hardware.network_bytes_per_s)


def optimizer_seconds(
    held: Held, copies: Copies, candidate: Candidate, hardware: Hardware, precision: Precision
) -> float:
    """Seconds after a step's last backward, none of it hidden: gradients are reduced and clipped,
    the shard is updated, weights are gathered and, for FP8, quantised."""
    # The norm reads all gradients, and the next step starts from zeros.
    passes = 2 * held.total * precision.gradient_bytes
    if precision.quantises:
        passes += held.total * (precision.weight_bytes + precision.operand_bytes)
    passes += shard(held, copies) * (
        FP32_BYTES + 2 * precision.optimizer_bytes + precision.weight_bytes
    )
    updating = passes / (hardware.hbm_bytes_per_s * TRAFFIC_SHARE)
    return updating + reduction_seconds(held, copies, candidate, hardware, precision)


def shard(held: Held, copies: Copies) -> float:
    """Parameters whose optimizer states one worker keeps."""
    return held.dense / copies.dense + held.routed / copies.routed
