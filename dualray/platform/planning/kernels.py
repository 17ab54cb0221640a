"""How long an operation takes on one GPU, from published speeds of kernels.

A matrix product is cut into output tiles, one tile a streaming multiprocessor (SM) at a time; the
last wave of tiles may leave SMs idle. A wave takes `overhead_s` (filling the pipeline, writing
the tile) and then runs at a fixed share of the SM's peak. Two constants for each kind of product
reproduce every published figure of DeepGEMM on an H800 for DeepSeek-V3's shapes within 7 %,
although those speeds differ by a factor of 2.3; the tests hold them to that. So small products,
narrow ones and those on fewer SMs cost what they would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dualray.platform.planning.hardware import Hardware
from dualray.platform.planning.precision import FP32_BYTES, Precision


@dataclass(frozen=True, kw_only=True)
class Product:
    """`groups` matrix products of rows x depth with depth x columns; for weight gradients, whose
    outputs add to FP32, rows and columns are the weight's."""

    rows: int
    columns: int
    depth: int
    groups: int = 1
    is_weight_grad: bool = False
    is_low_precision: bool = True
    """Whether it follows the training precision; else BF16 (head, router)."""

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.rows * self.columns * self.depth


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One causal attention kernel."""

    flops: float
    is_backward: bool = False


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A pass that only moves data: norms, rotation, activations, quantisation, permutation."""

    num_bytes: float


Operation = Product | Attention | Traffic


@dataclass(frozen=True, kw_only=True)
class ProductSpeed:
    """How fast tiles of one kind of product are computed."""

    tile_rows: int
    tile_columns: int
    peak_share: float
    """Share of an SM's peak once the pipeline is full."""
    overhead_s: float
    """Per wave."""


# DeepGEMM on an H800: README of February 2025; weight gradients: pull request 95.
FP8_PRODUCT = ProductSpeed(tile_rows=128, tile_columns=128, peak_share=0.738, overhead_s=2.1e-6)
FP8_WEIGHT_GRAD = ProductSpeed(tile_rows=128, tile_columns=152, peak_share=0.632, overhead_s=4.2e-6)
# The most that any shape reaches on an H100: 794.5 of 989 TFLOP/s (MAMF finder, S. Bekman).
BF16_PRODUCT = ProductSpeed(tile_rows=128, tile_columns=128, peak_share=0.803, overhead_s=2.1e-6)
# Adding to FP32 makes the tile's end as long as in the FP8 kernel.
BF16_WEIGHT_GRAD = replace(BF16_PRODUCT, overhead_s=FP8_WEIGHT_GRAD.overhead_s)

# The run of the report came before DeepGEMM, whose figures say by how much its kernels are faster
# than the tuned CUTLASS ones that it replaced: 1.0 to 1.2, 1.2 and 1.2.
DENSE_SLOWDOWN = 1.1
GROUPED_SLOWDOWN = 1.2
WEIGHT_GRAD_SLOWDOWN = 1.2

# Share of peak memory bandwidth of fused element-wise kernels: 85 to 94 % (torchao's casts).
TRAFFIC_SHARE = 0.85

# SMs that run the exchange's kernels while it is overlapped (arXiv 2412.19437, 3.2.2).
COMMUNICATION_SMS = 20


def is_fp8(product: Product, precision: Precision) -> bool:
    """Whether the product's operands are FP8."""
    return product.is_low_precision and precision.operand_bytes == 1


def product_seconds(
    product: Product, hardware: Hardware, precision: Precision, num_sms: int
) -> float:
    """Seconds of one product on `num_sms` SMs in a short benchmark, in DeepGEMM's kernels."""
    if is_fp8(product, precision):
        peak = hardware.fp8_flops_per_s
        speed = FP8_WEIGHT_GRAD if product.is_weight_grad else FP8_PRODUCT
    else:
        peak = _wide_peak(hardware, precision)
        speed = BF16_WEIGHT_GRAD if product.is_weight_grad else BF16_PRODUCT
    rows = math.ceil(product.rows / speed.tile_rows)
    columns = math.ceil(product.columns / speed.tile_columns)
    waves = math.ceil(product.groups * rows * columns / num_sms)
    tile_flops = 2 * speed.tile_rows * speed.tile_columns * product.depth
    per_sm = peak / hardware.num_sms * speed.peak_share
    return waves * (speed.overhead_s + tile_flops / per_sm)


def _wide_peak(hardware: Hardware, precision: Precision) -> float:
    """Peak of what is not FP8."""
    is_fp32 = precision.activation_bytes == FP32_BYTES
    return hardware.fp32_flops_per_s if is_fp32 else hardware.bf16_flops_per_s


def seconds(operation: Operation, hardware: Hardware, precision: Precision, num_sms: int) -> float:
    """Seconds of one operation in a run that lasts: at the sustained clock, in kernels as fast
    as the report's. Memory bandwidth depends on neither SMs nor clock."""
    if isinstance(operation, Traffic):
        return operation.num_bytes / (hardware.hbm_bytes_per_s * TRAFFIC_SHARE)
    clock = hardware.sustained_clock
    if isinstance(operation, Attention):
        rate = (
            hardware.attention_backward_flops_per_s
            if operation.is_backward
            else hardware.attention_forward_flops_per_s
        )
        rate *= _wide_peak(hardware, precision) / hardware.bf16_flops_per_s
        return operation.flops / (rate * clock * num_sms / hardware.num_sms)
    duration = product_seconds(operation, hardware, precision, num_sms) / clock
    return duration * _slowdown(operation, precision)


def _slowdown(product: Product, precision: Precision) -> float:
    if not is_fp8(product, precision):
        return 1.0
    if product.is_weight_grad:
        return WEIGHT_GRAD_SLOWDOWN
    return GROUPED_SLOWDOWN if product.groups > 1 else DENSE_SLOWDOWN
