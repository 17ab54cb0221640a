"""FP8 rows bit for bit against a loop over tiles in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from dualray.kernels.quantize import (
    E4M3,
    TILE,
    dequantise,
    exponents,
    num_tiles,
    quantise,
    scales_of_exponents,
)


def fp32(value: float) -> float:
    """Rounded to fp32. Of a float64 quotient of two fp32 this is their fp32 quotient."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


def nearest_e4m3(value: float) -> float:
    """4 exponent bits with bias 7 and 3 of mantissa: half to even, 448 at most."""
    if value == 0:
        return value
    exponent = max(math.frexp(abs(value))[1] - 1, -6)
    unit = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / unit) * unit, 448.0), value)


def naive(x_ND: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as float64 and scales, tile by tile."""
    N, D = x_ND.shape
    values = torch.empty(N, D, dtype=torch.float64)
    scales = torch.empty(N, num_tiles(D), dtype=torch.float64)
    for row, numbers in enumerate(x_ND.double().tolist()):
        for tile in range(num_tiles(D)):
            here = numbers[tile * TILE : (tile + 1) * TILE]
            scale = fp32(max(*map(abs, here), fp32(1e-4)) / 448)
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            scales[row, tile] = scale
            for column, number in enumerate(here):
                values[row, tile * TILE + column] = nearest_e4m3(fp32(number / scale))
    return values, scales


def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Magnitudes from 1e-9 to 1e9, a row of zeros, tiles that end in powers of two."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(12, width, generator=generator) * 10.0 ** torch.arange(-9, 3).view(-1, 1)
    x[-1] *= 1e7
    x[3] = 0
    x[4, 0], x[5, 0] = 448.0, -896.0
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 128, 130, 384])
def test_values_and_scales_are_those_of_the_twin(width, dtype, power_of_two) -> None:
    x = rows(width, dtype)
    values, scales = quantise(x, power_of_two=power_of_two)
    assert (values.dtype, values.shape) == (E4M3, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (12, num_tiles(width)))
    twin_values, twin_scales = naive(x, power_of_two)
    assert torch.equal(scales.double(), twin_scales)
    assert torch.equal(values.double(), twin_values)
    product = twin_values * twin_scales.repeat_interleave(TILE, 1)[:, :width]
    for out in (torch.float32, torch.float64, torch.bfloat16):
        # One product is exact in float64; it is rounded to fp32, then to a smaller type.
        assert torch.equal(dequantise(values, scales, out), product.to(torch.float32).to(out))


def test_every_byte_is_decoded_as_torch_does() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 256).view(E4M3)
    finite = values.to(torch.float32).isfinite()[0]
    one = torch.ones(1, 2)
    decoded = dequantise(values, one, torch.float32)
    assert torch.equal(decoded[:, finite], values.to(torch.float32)[:, finite])
    assert decoded[:, ~finite].isnan().all()
    only = values[:, finite]
    assert torch.equal(dequantise(only, one, torch.float32), only.to(torch.float32))


def test_gaussians_have_the_expected_error() -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for power_of_two in (False, True):
        back = dequantise(*quantise(x, power_of_two=power_of_two), torch.float32)
        # E4M3 keeps 3 bits: uniform errors of half a unit at most, 0.026 as rms over a binade.
        assert float((back - x).norm() / x.norm()) == pytest.approx(0.0265, rel=0.03)


def test_other_tiles_over_power_of_two_scales_lose_nothing() -> None:
    """1 x 128 to 128 x 1, as the weight gradients' product needs them."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    once = dequantise(*quantise(x, power_of_two=True), torch.float32)
    again = dequantise(*quantise(once.t().contiguous(), power_of_two=True), torch.float32).t()
    assert torch.equal(again, once)
    rough = dequantise(*quantise(x, power_of_two=False), torch.float32)
    twice = dequantise(*quantise(rough.t().contiguous(), power_of_two=False), torch.float32).t()
    assert not torch.equal(twice, rough)


def test_exponents_round_up_and_come_back() -> None:
    scales = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 2.0**-22, 3e-7, 2.0**120])
    expected = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0**-22, 2.0**-21, 2.0**120])
    assert torch.equal(scales_of_exponents(exponents(scales)), expected)
    powers = 2.0 ** torch.arange(-126, 128, dtype=torch.float64).to(torch.float32)
    assert exponents(powers).tolist() == list(range(1, 255))
    assert exponents(torch.tensor([math.inf, math.nan])).tolist() == [255, 255]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_stays_so_in_its_tile(bad, power_of_two) -> None:
    x = torch.ones(2, 200)
    x[0, 5] = bad
    back = dequantise(*quantise(x, power_of_two=power_of_two), torch.float32)
    assert not back[0, 5].isfinite()
    assert torch.equal(back[1], torch.ones(200))
    assert torch.equal(back[0, 128:], torch.ones(72))


def test_no_rows() -> None:
    for width in (64, 128, 200):
        values, scales = quantise(torch.empty(0, width), power_of_two=True)
        assert dequantise(values, scales, torch.bfloat16).shape == (0, width)
