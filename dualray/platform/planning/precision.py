"""What a number takes in memory and on the wire, by training precision."""

from __future__ import annotations

from dataclasses import dataclass

BF16_BYTES = 2
FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes of one value of each kind; all but norms, router, head and embedding follow it."""

    name: str
    """`fp8` as in arXiv 2412.19437, 3.3, or a `train.dtype`."""
    operand_bytes: int
    """An operand of a matrix product, and a value sent to an expert."""
    scale_bytes_per_value: float
    """Scales beside the operands: FP32 for 1 x 128 values."""
    activation_bytes: int
    """A value of the residual stream and of a product's output."""
    weight_bytes: int
    """A parameter as the workers hold it."""
    gradient_bytes: int
    """A gradient as micro-batches add to it."""
    optimizer_bytes: int
    """Master weight and both moments of a parameter."""

    @property
    def quantises(self) -> bool:
        """Whether operands are made from wider values, in passes of their own."""
        return self.operand_bytes < self.activation_bytes


FP8 = Precision(
    name="fp8",
    operand_bytes=1,
    scale_bytes_per_value=4 / 128,
    activation_bytes=BF16_BYTES,
    weight_bytes=BF16_BYTES,
    gradient_bytes=FP32_BYTES,
    # FP32 master weights and BF16 moments (3.3.2).
    optimizer_bytes=FP32_BYTES + 2 * BF16_BYTES,
)
BFLOAT16 = Precision(
    name="bfloat16",
    operand_bytes=BF16_BYTES,
    scale_bytes_per_value=0.0,
    activation_bytes=BF16_BYTES,
    weight_bytes=BF16_BYTES,
    gradient_bytes=FP32_BYTES,
    optimizer_bytes=3 * FP32_BYTES,
)
FLOAT32 = Precision(
    name="float32",
    operand_bytes=FP32_BYTES,
    scale_bytes_per_value=0.0,
    activation_bytes=FP32_BYTES,
    weight_bytes=FP32_BYTES,
    gradient_bytes=FP32_BYTES,
    # The weights are their own masters.
    optimizer_bytes=2 * FP32_BYTES,
)
PRECISIONS = {precision.name: precision for precision in (FP8, BFLOAT16, FLOAT32)}
