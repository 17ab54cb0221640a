"""What fills a GPU's memory during a step, by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from dualray.model.config import ModelConfig
from dualray.model.formulas import main_parameters, mtp_parameters
from dualray.platform.planning.exchange import reach
from dualray.platform.planning.holding import Copies, Held, is_mirrored, shard
from dualray.platform.planning.precision import FP32_BYTES, Precision
from dualray.platform.planning.setting import Candidate, Setting
from dualray.schedule.actions import Kind, Schedule, flatten
from dualray.schedule.make import make_schedule

# Share of memory that drivers, communicators and a fragmented allocator keep to themselves.
RESERVED_SHARE = 0.05

# The attention's output is kept in 12 bits (E5M6) under FP8 (arXiv 2412.19437, 3.3.3).
_OUTPUT_BYTES_FP8 = 1.5


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    """Parameters of the rank's stages."""
    mirrored_weights: float
    """DualPipe's second copy: parameters of the stage of the other direction."""
    quantised_weights: float
    """FP8 operands made of the weights once a step."""
    gradients: float
    """Of all held parameters."""
    optimizer_shard: float
    """Master weights and moments of this worker's share."""
    activations: float
    """What live micro-batches and queued weight gradients keep."""
    exchange_buffers: float
    """Tokens on their way to and from experts, and what experts are working on."""
    logits: float
    """Of one micro-batch, on the rank with the head."""
    reserved: float
    """What is never available."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What live micro-batches and queued weight gradients keep of one stage."""

    micro_batches: int
    bytes_each: float


def kept_by_rank(setting: Setting, candidate: Candidate, schedule: Schedule) -> list[list[Kept]]:
    """For the fullest moment of each pipeline rank, what it keeps of each of its stages."""
    each = activation_bytes(
        setting.model,
        setting.precision,
        candidate.layers_per_stage,
        candidate.batch(setting.seq_len).num_tokens,
    )
    moments = _live(candidate.schedule, candidate.pipeline, _most(candidate))
    by_rank = []
    for stages, counts in zip(schedule.stage_of, moments):
        sizes = [each[stage] for stage in stages]
        fullest = max(counts, key=lambda live: sum(n * size for n, size in zip(live, sizes)))
        by_rank.append([Kept(micro_batches=n, bytes_each=size) for n, size in zip(fullest, sizes)])
    return by_rank


def memory_by_rank(
    setting: Setting,
    candidate: Candidate,
    schedule: Schedule,
    held: Sequence[Held],
    copies: Copies,
) -> list[Memory]:
    """Bytes on the GPUs of each pipeline rank."""
    model, precision = setting.model, setting.precision
    num_tokens = candidate.batch(setting.seq_len).num_tokens
    buffers = _exchange_bytes(model, precision, candidate.experts, num_tokens)
    ranks = []
    for stages, kept in zip(schedule.stage_of, kept_by_rank(setting, candidate, schedule)):
        both = sum((held[stage] for stage in stages), start=Held())
        mirrored = held[stages[1]].total if is_mirrored(schedule) else 0
        quantised = both.total - both.full_width if precision.quantises else 0
        last = schedule.num_stages - 1 in stages
        ranks.append(
            Memory(
                weights=precision.weight_bytes * (both.total - mirrored),
                mirrored_weights=precision.weight_bytes * mirrored,
                quantised_weights=precision.operand_bytes * quantised,
                gradients=precision.gradient_bytes * both.total,
                optimizer_shard=precision.optimizer_bytes * shard(both, copies),
                activations=sum(each.micro_batches * each.bytes_each for each in kept),
                exchange_buffers=buffers,
                logits=FP32_BYTES * num_tokens * model.vocab_size if last else 0.0,
                reserved=RESERVED_SHARE * setting.cluster.hardware.memory_bytes,
            )
        )
    return ranks


def least_bytes(setting: Setting, candidate: Candidate) -> float:
    """What the fullest GPU holds at least, wherever the layers are cut: its share of weights and
    gradients in the mean over the pipeline."""
    parts, mtp = main_parameters(setting.model), mtp_parameters(setting.model)
    routed = parts["routed_experts"] + mtp["routed_experts"]
    dense = sum(parts.values()) + sum(mtp.values()) - routed
    mirrors = 2 if candidate.schedule == "dualpipe" else 1
    held = mirrors * (dense + routed / candidate.experts) / candidate.pipeline
    return held * (setting.precision.weight_bytes + setting.precision.gradient_bytes)


def activation_bytes(
    model: ModelConfig, precision: Precision, layers_per_stage: Sequence[int], num_tokens: int
) -> list[float]:
    """What a micro-batch keeps in each stage from its forward to its weight gradients.

    Norms, up-projections of the latents and SwiGLU's output are computed again (3.2.3), so kept
    are the residual stream before each norm, the latents, the attention's output and sums, and
    the inputs of experts and of SwiGLU.
    """
    D, H = model.hidden_size, model.num_attention_heads
    value, operand = precision.activation_bytes, precision.operand_bytes
    # Queries and keys, or the latents that they are made of.
    inputs = (model.q_lora_rank or H * model.qk_head_dim) + model.cache_dim
    output = _OUTPUT_BYTES_FP8 if precision.quantises else value
    attention = value * inputs + H * (model.v_head_dim * output + FP32_BYTES)
    common = 2 * D * value + attention
    F = model.moe_intermediate_size
    K = model.num_experts_per_tok
    moe = common + operand * (K * D + 2 * F * (K + model.n_shared_experts))
    dense = common + operand * 2 * model.intermediate_size
    stages, first = [], 0
    for count in layers_per_stage:
        layers = range(first, first + count)
        stages.append(num_tokens * sum(moe if model.is_moe(each) else dense for each in layers))
        first += count
    projected = 2 * D * operand
    stages[-1] += num_tokens * (D * value + model.num_nextn_predict_layers * (moe + projected))
    return stages


def _exchange_bytes(
    model: ModelConfig, precision: Precision, experts: int, num_tokens: int
) -> float:
    """A forward's and a backward's tokens: received, sent back, and copied for each expert."""
    arriving = num_tokens * reach(model, experts, experts)
    copied = num_tokens * model.num_experts_per_tok
    width = precision.operand_bytes + precision.activation_bytes
    return 2 * model.hidden_size * width * ((arriving if experts > 1 else 0) + copied)


def _most(candidate: Candidate) -> int:
    """So many micro-batches fill a pipeline as full as more do; GPipe keeps all."""
    if candidate.schedule == "gpipe":
        return candidate.micro_batches
    return min(candidate.micro_batches, 4 * candidate.pipeline)


@cache
def _live(
    kind: str, num_ranks: int, num_micro_batches: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each rank the numbers of micro-batches that its directions keep, at one time each.

    A micro-batch is kept until its weight gradients are computed. Numbers that another moment
    exceeds in all directions are left out.
    """
    if kind == "gpipe":
        return (((num_micro_batches,),),) * num_ranks
    schedule = make_schedule(kind, num_ranks, num_micro_batches)
    ranks = []
    for steps, stages in zip(schedule.steps, schedule.stage_of):
        counts, seen = [0] * len(stages), set()
        for action in flatten(steps):
            if action.kind is Kind.FORWARD:
                counts[action.direction] += 1
                seen.add(tuple(counts))
            elif action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD):
                counts[action.direction] -= 1
        ranks.append(_maximal(seen))
    return tuple(ranks)


def _maximal(counts: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Those that no other one reaches in every direction; there are one or two directions."""
    kept: list[tuple[int, ...]] = []
    for one in sorted(counts, reverse=True):
        if not kept or (len(one) > 1 and one[1] > kept[-1][1]):
            kept.append(one)
    return tuple(kept)
