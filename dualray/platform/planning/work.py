"""What one micro-batch costs in each part of the model, as lists of operations.

Forward (F), input gradients (I) and weight gradients (W) apart, as schedules order them. Counted
are the matrix products with their shapes, the attention kernels, and the bytes of the passes
between them, each pass once from memory and back. Recomputed in the backward are RMSNorms, the
up-projections from both latents, and SwiGLU's output (arXiv 2412.19437, 3.2.3 and 3.3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualray.model.config import ModelConfig
from dualray.model.formulas import attention_flops, attention_projections
from dualray.platform.planning.exchange import reach
from dualray.platform.planning.kernels import Attention, Operation, Product, Traffic
from dualray.platform.planning.precision import BF16_BYTES, FP32_BYTES, Precision

# Largest over mean load of a layer's experts, less one: MaxVio of balance by bias (arXiv
# 2408.15664, table 2), over much text. A single micro-batch is seldom better.
EXPERT_IMBALANCE = 0.04


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of one micro-batch of a layer, or of what a stage has besides."""

    forward: tuple[Operation, ...] = ()
    input_grad: tuple[Operation, ...] = ()
    weight_grad: tuple[Operation, ...] = ()
    num_exchanges: int = 0
    """Layers among them that send tokens to experts and back."""

    def __add__(self, other: Work) -> Work:
        return Work(
            forward=self.forward + other.forward,
            input_grad=self.input_grad + other.input_grad,
            weight_grad=self.weight_grad + other.weight_grad,
            num_exchanges=self.num_exchanges + other.num_exchanges,
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one worker."""

    num_sequences: int
    seq_len: int

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.seq_len


def dense_layer(model: ModelConfig, batch: Batch, precision: Precision) -> Work:
    """A layer with one FFN."""
    ffn = _ffn(model.hidden_size, model.intermediate_size, batch.num_tokens, 1, precision)
    return _attention(model, batch, precision) + ffn + _norm_traffic(model, batch, precision)


def moe_layer(model: ModelConfig, batch: Batch, precision: Precision, num_ranks: int) -> Work:
    """A layer with experts, on the expert rank that the most tokens come to."""
    T, D, F = batch.num_tokens, model.hidden_size, model.moe_intermediate_size
    held = model.n_routed_experts // num_ranks
    load = 1 + (EXPERT_IMBALANCE if num_ranks > 1 else 0.0)
    rows = math.ceil(load * T * model.num_experts_per_tok / held)
    work = _attention(model, batch, precision) + _norm_traffic(model, batch, precision)
    work += _ffn(D, F, rows, held, precision)
    if model.n_shared_experts:
        work += _ffn(D, model.n_shared_experts * F, T, 1, precision)
    router = {"is_low_precision": False}
    E = model.n_routed_experts
    work += Work(
        forward=(Product(rows=T, columns=E, depth=D, **router),),
        input_grad=(Product(rows=T, columns=D, depth=E, **router),),
        weight_grad=(Product(rows=E, columns=D, depth=T, is_weight_grad=True, **router),),
    )
    # A token arrives once at each rank and is copied for each of its experts there; results of
    # one rank are added before they go back.
    arriving = load * T * reach(model, num_ranks, num_ranks)
    value, operand = precision.activation_bytes, precision.operand_bytes
    spread = Traffic(num_bytes=held * rows * D * 2 * operand)
    gather = Traffic(num_bytes=(held * rows + arriving) * D * value)
    # Weight gradients multiply along tokens, so operands are quantised again along them.
    again = 2 * held * rows * D * 2 * operand if precision.quantises else 0
    return work + Work(
        forward=(spread, gather),
        input_grad=(spread, gather),
        weight_grad=(Traffic(num_bytes=again),),
        num_exchanges=1 if num_ranks > 1 else 0,
    )


def head(model: ModelConfig, batch: Batch) -> Work:
    """Logits in BF16 operands, and their loss in FP32 (arXiv 2412.19437, 3.3.1)."""
    T, D, V = batch.num_tokens, model.hidden_size, model.vocab_size
    logits = T * V * FP32_BYTES
    operand = T * V * BF16_BYTES
    return Work(
        forward=(
            Product(rows=T, columns=V, depth=D, is_low_precision=False),
            Traffic(num_bytes=logits),
        ),
        input_grad=(
            Product(rows=T, columns=D, depth=V, is_low_precision=False),
            # Read, replaced by their gradient, and that made an operand.
            Traffic(num_bytes=3 * logits + operand),
        ),
        weight_grad=(
            Product(rows=V, columns=D, depth=T, is_weight_grad=True, is_low_precision=False),
        ),
    )


def mtp_module(model: ModelConfig, batch: Batch, precision: Precision, num_ranks: int) -> Work:
    """One module of multi-token prediction: projection, layer, and the head once more."""
    D = model.hidden_size
    projection = _linear(batch.num_tokens, D, 2 * D, 1)
    layer = moe_layer(model, batch, precision, num_ranks)
    return projection + layer + head(model, batch)


def _linear(rows: int, columns: int, depth: int, groups: int) -> Work:
    return Work(
        forward=(Product(rows=rows, columns=columns, depth=depth, groups=groups),),
        input_grad=(Product(rows=rows, columns=depth, depth=columns, groups=groups),),
        weight_grad=(
            Product(rows=columns, columns=depth, depth=rows, groups=groups, is_weight_grad=True),
        ),
    )


def _ffn(D: int, F: int, rows: int, groups: int, precision: Precision) -> Work:
    value, operand = precision.activation_bytes, precision.operand_bytes
    products = _linear(rows, 2 * F, D, groups) + _linear(rows, D, F, groups)
    values = groups * rows * F
    # Backward: the output's gradient and the kept inputs come in; gradients of both inputs go
    # out, in both tilings if quantised, and the output once more for the weight gradient.
    gradients = 2 * operand * (2 if precision.quantises else 1)
    return products + Work(
        forward=(Traffic(num_bytes=values * (2 * value + operand)),),
        input_grad=(Traffic(num_bytes=values * (value + 2 * operand + gradients + operand)),),
    )


def _attention(model: ModelConfig, batch: Batch, precision: Precision) -> Work:
    T, D = batch.num_tokens, model.hidden_size
    shapes = attention_projections(model)
    output = shapes.pop("o_proj")
    up = [shapes.pop(name) for name in ("q_b_proj", "kv_b_proj") if name in shapes]
    # What reads the residual stream is one product.
    down = sum(out for out, _ in shapes.values())
    ups = sum((_linear(T, *shape, 1) for shape in up), start=Work())
    work = _linear(T, down, D, 1) + ups + _linear(T, *output, 1)
    keys = (batch.seq_len + 1) / 2
    forward = T * attention_flops(model, keys)
    # Scores again, and gradients of probabilities, values, queries and keys.
    q, v = model.qk_head_dim, model.v_head_dim
    backward = forward * (3 * q + 2 * v) / (q + v)
    heads = _head_values(model)
    value, operand = precision.activation_bytes, precision.operand_bytes
    o = model.num_attention_heads * v
    latents = (model.q_lora_rank or 0) + (model.cache_dim if model.attention == "mla" else 0)
    # Rotating and laying out queries, keys and values; norms of the latents.
    arrange = T * (2 * heads + 2 * latents) * value
    linears = D + latents + o
    outputs = down + sum(out for out, _ in up) + D
    quantise = T * o * (value + operand) if precision.quantises else 0
    both_tilings = T * outputs * (value + 2 * operand) if precision.quantises else 0
    again = T * linears * 2 * operand if precision.quantises else 0
    return work + Work(
        forward=(Attention(flops=forward), Traffic(num_bytes=arrange + quantise)),
        input_grad=(
            *ups.forward,
            Attention(flops=backward, is_backward=True),
            # Recomputed, then backwards; and outputs times their gradients.
            Traffic(num_bytes=2 * arrange + 2 * T * o * value + both_tilings),
        ),
        weight_grad=(Traffic(num_bytes=again),),
    )


def _head_values(model: ModelConfig) -> int:
    """Values of a token's queries, keys and values over all heads."""
    G = model.key_value_heads
    queries = model.num_attention_heads * model.qk_head_dim
    return queries + G * (model.qk_head_dim + model.v_head_dim)


def _norm_traffic(model: ModelConfig, batch: Batch, precision: Precision) -> Work:
    """Two RMSNorms with what is added to the residual stream before them."""
    value, operand = precision.activation_bytes, precision.operand_bytes
    stream = 2 * batch.num_tokens * model.hidden_size
    return Work(
        forward=(Traffic(num_bytes=stream * (3 * value + operand)),),
        # Recomputed (one read, one write); then input and gradient in, sum of gradients out.
        input_grad=(Traffic(num_bytes=stream * (value + operand + 4 * value)),),
    )
