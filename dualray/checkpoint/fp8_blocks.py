"""FP8 weights with a scale per block, as DeepSeek-V3 was released (arXiv 2412.19437, 3.3.2).

A weight NAME of float8_e4m3fn and shape (m, n) has beside it NAME_scale_inv, fp32 of shape
(ceil(m / 128), ceil(n / 128)): a value is its element times the scale of its block. Blocks
at the lower and right edge may be partial. M rows, N columns, B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualray.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"


def scale_name(name: str) -> str:
    """Name of the scales of the FP8 weight `name`."""
    return f"{name}{SCALE_SUFFIX}"


def block_of(quantization: Any) -> tuple[int, int]:
    """Rows and columns of a block, from the `quantization_config` of a config.json.

    Raises CheckpointError unless it is block-wise FP8 as described above.
    """
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"quantization_config of config.json is {quantization} and must say what the blocks of "
            "FP8 weights are",
            hint="take the config.json of the model, or the weights in bfloat16",
        )
    wanted = {"quant_method": "fp8", "fmt": "e4m3"}
    for field, supported in wanted.items():
        found = quantization.get(field, supported)
        if found != supported:
            raise CheckpointError(
                f"quantization_config.{field} of config.json is {found} and dualray reads only "
                f"{supported}",
                hint="take the weights in bfloat16",
            )
    block = quantization.get("weight_block_size")
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or any(type(side) is not int or side < 1 for side in block)
    ):
        raise CheckpointError(
            f"quantization_config.weight_block_size of config.json is {block} and must be two "
            "whole numbers above 0",
            hint="take the config.json of the model, or the weights in bfloat16",
        )
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight of `shape`."""
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=True))


def dequantised(
    values_MN: Tensor, rows_M: Tensor, scales_BB: Tensor, block: tuple[int, int]
) -> Tensor:
    """fp32 values of some rows of an FP8 weight; `rows_M` int64 are their numbers in it."""
    scales_MN = scales_BB[rows_M // block[0]].repeat_interleave(block[1], dim=1)
    return values_MN.to(torch.float32).mul_(scales_MN[:, : values_MN.shape[1]])
