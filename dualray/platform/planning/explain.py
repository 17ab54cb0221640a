"""A layout's figures, each with the formula that gives it: numbers, and names of other figures."""

from __future__ import annotations

from collections.abc import Iterator

from dualray.platform.planner import Figure
from dualray.platform.planning.estimate import SECONDS_PER_HOUR, TRILLION, Estimate
from dualray.platform.planning.exchange import combine_bytes, dispatch_bytes, visits
from dualray.platform.planning.fit import outline
from dualray.platform.planning.holding import Held, is_mirrored, ring_bytes_per_s
from dualray.platform.planning.kernels import (
    COMMUNICATION_SMS,
    TRAFFIC_SHARE,
    Attention,
    Product,
    Traffic,
    seconds,
)
from dualray.platform.planning.memory import RESERVED_SHARE, kept_by_rank
from dualray.platform.planning.precision import FP32_BYTES
from dualray.platform.planning.setting import Setting
from dualray.platform.planning.work import EXPERT_IMBALANCE, moe_layer

_PHASES = {
    "F": "forwards",
    "I": "input gradients",
    "B": "backwards",
    "W": "weight gradients",
    "F&B": "overlapped pairs",
}


def explain(setting: Setting, estimate: Estimate) -> dict[str, tuple[Figure, ...]]:
    """Figures by unit."""
    layer = {"seconds of a micro-batch in a MoE layer": tuple(_layer(setting, estimate))}
    return {
        **(layer if setting.model.moe_layers else {}),
        "seconds of a step": tuple(_step(setting, estimate)),
        "throughput": tuple(_throughput(setting, estimate)),
        "bytes a GPU": tuple(_bytes(setting, estimate)),
    }


def _layer(setting: Setting, estimate: Estimate) -> Iterator[Figure]:
    """Forward and backward in an overlapped pair, on the SMs that its exchanges leave."""
    candidate, hardware, precision = estimate.candidate, setting.cluster.hardware, setting.precision
    batch = candidate.batch(setting.seq_len)
    work = moe_layer(setting.model, batch, precision, candidate.experts)
    operations = work.forward + work.input_grad + work.weight_grad
    num_sms = hardware.num_sms - COMMUNICATION_SMS

    def timed(found: list[Product] | list[Attention] | list[Traffic]) -> float:
        return sum(seconds(each, hardware, precision, num_sms) for each in found)

    products = [each for each in operations if isinstance(each, Product)]
    attentions = [each for each in operations if isinstance(each, Attention)]
    passes = [each for each in operations if isinstance(each, Traffic)]
    for name, flops, value in (
        ("matrix products", sum(each.flops for each in products), timed(products)),
        ("attention", sum(each.flops for each in attentions), timed(attentions)),
    ):
        yield Figure(name=name, value=value, formula=f"{flops:.0f} / {flops / value:.0f}")
    moved = sum(each.num_bytes for each in passes)
    yield Figure(
        name="passes over memory",
        value=timed(passes),
        formula=f"{moved:.0f} / ({TRAFFIC_SHARE} x {hardware.hbm_bytes_per_s:.0f})",
    )
    if candidate.experts > 1:
        number, rate = visits(setting.model, hardware, candidate.experts)
        values = f"{1 + EXPERT_IMBALANCE} x {batch.num_tokens} x {setting.model.hidden_size}"
        width = dispatch_bytes(precision) + combine_bytes(precision)
        yield Figure(
            name="exchanges",
            value=2 * (1 + EXPERT_IMBALANCE) * batch.num_tokens * setting.model.hidden_size
            * width * number / rate,
            formula=f"2 x {values} x {width} x {number:.4f} / {rate:.0f}",
        )  # fmt: skip


def _step(setting: Setting, estimate: Estimate) -> Iterator[Figure]:
    names = []
    for kind, value in estimate.phases_s.items():
        number = estimate.num_actions[kind]
        names.append(_PHASES[kind])
        yield Figure(name=names[-1], value=value, formula=f"{number} x {value / number:.6f}")
    pipeline = estimate.candidate.pipeline
    yield Figure(
        name="bubble",
        value=estimate.bubble_s,
        formula=f"{estimate.bubble_s * pipeline:.6f} / {pipeline}",
    )
    fit, hardware, precision = estimate.fit, setting.cluster.hardware, setting.precision
    held, copies = fit.updated, fit.copies
    ring = ring_bytes_per_s(fit.candidate, hardware)
    width = precision.gradient_bytes + precision.weight_bytes
    yield Figure(
        name="reduction",
        value=fit.reduction_s,
        formula=f"{width} x ({held.dense} x {copies.dense - 1} / {copies.dense} / {ring:.0f} + "
        f"{held.routed} x {copies.routed - 1} / {copies.routed} / "
        f"{hardware.network_bytes_per_s:.0f})",
    )
    update = fit.optimizer_s - fit.reduction_s
    bandwidth = hardware.hbm_bytes_per_s * TRAFFIC_SHARE
    yield Figure(
        name="update",
        value=update,
        formula=f"{update * bandwidth:.0f} / ({TRAFFIC_SHARE} x {hardware.hbm_bytes_per_s:.0f})",
    )
    parts = [*names, "bubble", "reduction", "update"]
    yield Figure(name="step", value=estimate.step_s, formula=" + ".join(parts))


def _throughput(setting: Setting, estimate: Estimate) -> Iterator[Figure]:
    candidate = estimate.candidate
    yield Figure(
        name="tokens a step",
        value=candidate.num_sequences * setting.seq_len,
        formula=f"{candidate.num_sequences} x {setting.seq_len}",
    )
    yield Figure(
        name="tokens/s a GPU",
        value=estimate.tokens_per_s_per_gpu,
        formula=f"tokens a step / step / {candidate.num_gpus}",
    )
    yield Figure(
        name="GPU hours a trillion",
        value=estimate.gpu_hours_per_trillion,
        formula=f"{TRILLION:.0f} / tokens/s a GPU / {SECONDS_PER_HOUR}",
    )
    yield Figure(
        name="dollars a trillion",
        value=estimate.dollars_per_trillion,
        formula=f"GPU hours a trillion x {estimate.dollars_per_gpu_hour}",
    )


def _bytes(setting: Setting, estimate: Estimate) -> Iterator[Figure]:
    """The fullest GPU's, in the order of `Memory`."""
    fit, precision = estimate.fit, setting.precision
    schedule = outline(fit.candidate.schedule, fit.candidate.pipeline)
    stages = schedule.stage_of[fit.fullest]
    both = sum((fit.held[stage] for stage in stages), start=Held())
    mirrored = fit.held[stages[1]].total if is_mirrored(schedule) else 0
    kept = kept_by_rank(setting, fit.candidate, schedule)[fit.fullest]
    live = " + ".join(f"{each.micro_batches} x {each.bytes_each:.0f}" for each in kept)
    tokens = fit.candidate.batch(setting.seq_len).num_tokens
    narrow = both.total - both.full_width if precision.quantises else 0
    formulas = {
        "weights": f"{precision.weight_bytes} x {both.total - mirrored}",
        "mirrored_weights": f"{precision.weight_bytes} x {mirrored}",
        "quantised_weights": f"{precision.operand_bytes} x {narrow}",
        "gradients": f"{precision.gradient_bytes} x {both.total}",
        "optimizer_shard": f"{precision.optimizer_bytes} x ({both.dense} / {fit.copies.dense} + "
        f"{both.routed} / {fit.copies.routed})",
        "activations": live,
        "exchange_buffers": f"{fit.memory.exchange_buffers:.0f}",
        "logits": f"{FP32_BYTES} x {tokens} x {setting.model.vocab_size}"
        if fit.memory.logits
        else "0",
        "reserved": f"{RESERVED_SHARE} x {setting.cluster.hardware.memory_bytes}",
    }
    for name, formula in formulas.items():
        yield Figure(name=name.replace("_", " "), value=getattr(fit.memory, name), formula=formula)
    names = " + ".join(name.replace("_", " ") for name in formulas)
    yield Figure(name="all together", value=fit.memory.total, formula=names)
