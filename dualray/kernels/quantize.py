"""Rows in FP8: E4M3 values with a scale per tile of 1 x 128 (arXiv 2412.19437, section 3.3.2).

A tile's scale is what its values are multiplied with to get the numbers back: max(amax, 1e-4) / 448
in fp32, where 448 is the largest E4M3. Rounded up to a power of two it is a single byte (UE8M0, the
exponent of an fp32), nothing is rounded by it, and other tiles may be laid over the same numbers
with no second error but underflow. What is not finite comes back as that, and may take others of
its tile along. N rows, D width, B = ceil(D / 128) tiles of a row, of which the last may be partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualray.kernels.blocks import blocks

E4M3 = torch.float8_e4m3fn
TILE = 128
_LARGEST = 448.0
_MIN_AMAX = 1e-4
_MANTISSA_BITS = 23
_E4M3_IN_FP32 = 0x87F0_0000 - 2**32
"""Bits of an int32: the sign, and seven that begin four below the exponent's first."""


def num_tiles(width: int) -> int:
    """Tiles of a row of that many values."""
    return -(-width // TILE)


def quantise(x_ND: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """E4M3 values (N, D) and fp32 scales (N, B). Arithmetic is fp32, whatever the dtype of x."""
    N, D = x_ND.shape
    values_ND = torch.empty(N, D, dtype=E4M3, device=x_ND.device)
    scales_NB = torch.empty(N, num_tiles(D), dtype=torch.float32, device=x_ND.device)
    for rows in blocks(x_ND):
        quantise_into(x_ND[rows], values_ND[rows], scales_NB[rows], power_of_two=power_of_two)
    return values_ND, scales_NB


def quantise_into(
    x_ND: Tensor, values_ND: Tensor, scales_NB: Tensor, *, power_of_two: bool
) -> None:
    """The same into given tensors, which may be parts of a wider buffer. All rows in one pass."""
    D = x_ND.shape[1]
    whole = D - D % TILE
    for columns, tiles in (
        (slice(whole), slice(D // TILE)),
        (slice(whole, D), slice(D // TILE, None)),
    ):
        part = x_ND[:, columns].to(torch.float32)
        if not part.shape[1]:
            continue
        part_NBt = part.unflatten(1, (-1, min(part.shape[1], TILE)))
        scale_NB = part_NBt.abs().amax(-1).clamp_(min=_MIN_AMAX).div_(_LARGEST)
        if power_of_two:
            scale_NB = scales_of_exponents(exponents(scale_NB))
        scales_NB[:, tiles] = scale_NB
        values_ND[:, columns].copy_(part_NBt.div(scale_NB[..., None]).flatten(1))


def dequantise(values_ND: Tensor, scales_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D) products of values and scales, rounded once from fp32 to `dtype`."""
    out_ND = torch.empty(values_ND.shape, dtype=dtype, device=values_ND.device)
    whole = values_ND.shape[1] // TILE
    for rows in blocks(values_ND):
        x_ND = _to_fp32(values_ND[rows])
        scale_NB = scales_NB[rows]
        if whole:
            x_ND[:, : whole * TILE].unflatten(1, (-1, TILE)).mul_(scale_NB[:, :whole, None])
        x_ND[:, whole * TILE :].mul_(scale_NB[:, whole:])
        out_ND[rows] = x_ND
    return out_ND


def _to_fp32(values_ND: Tensor) -> Tensor:
    """fp32 of E4M3. Torch's own cast takes 7 ns a value on a CPU (Zen 4), this a tenth of it."""
    bytes_ND = values_ND.view(torch.int8)
    if values_ND.device.type != "cpu" or bool((bytes_ND & 127 == 127).any()):
        return values_ND.to(torch.float32)  # 127 is NaN
    # Sign, exponent and mantissa to their places; the exponent's bias is 7 there, here 127.
    bits_ND = bytes_ND.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_E4M3_IN_FP32)
    return bits_ND.view(torch.float32).mul_(2.0**120)


def exponents(scales: Tensor) -> Tensor:
    """uint8 UE8M0 of positive fp32 scales, rounded up to powers of two; 255 if not finite."""
    bits = scales.view(torch.int32)
    return ((bits - 1) >> _MANTISSA_BITS).add_(1).clamp_(max=255).to(torch.uint8)


def scales_of_exponents(exponents: Tensor) -> Tensor:
    """fp32 powers of two of UE8M0 bytes."""
    return (exponents.to(torch.int32) << _MANTISSA_BITS).view(torch.float32)
