"""Random numbers as a pure function of (seed, position, token id).

Nothing is drawn from a generator that would have to be kept, moved or rewound: whoever computes
the number gets the same one, in any order, on any device, beside any other rows. Each
(seed, position) keys a splitmix64 stream of its own (a Weyl sequence through a finaliser of shifts
and multiplications, doi 10.1145/2660193.2660195), of which token i reads element i + 1. B rows,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def exponentials(keys: Iterable[tuple[int, int]], num_tokens: int, device: torch.device) -> Tensor:
    """(B, V) float64, exponentially distributed with mean 1, of every `keys` = (seed, position).

    Above 0 and finite: made of 52 random bits, the middle of each of 2^52 equal parts of (0, 1).
    """
    streams = [_finalise(_finalise(seed & _MASK) ^ position) for seed, position in keys]
    on_cpu = device.type == "cpu"
    return _by_numpy(streams, num_tokens) if on_cpu else _by_torch(streams, num_tokens, device)


def _by_numpy(streams: list[int], num_tokens: int) -> Tensor:
    """Numbers without a sign, which torch cannot shift: a third of its time on a CPU."""
    state_BV = np.arange(1, num_tokens + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    state_BV = state_BV + np.array(streams, dtype=np.uint64)[:, None]
    for shift, factor in zip(_SHIFTS, _FACTORS):
        state_BV ^= state_BV >> np.uint64(shift)
        state_BV *= np.uint64(factor)
    state_BV ^= state_BV >> np.uint64(_SHIFTS[-1])
    state_BV >>= np.uint64(12)
    uniform_BV = state_BV.astype(np.float64)
    uniform_BV += 0.5
    uniform_BV *= 2.0**-52
    return torch.from_numpy(np.negative(np.log(uniform_BV, out=uniform_BV), out=uniform_BV))


def _by_torch(streams: list[int], num_tokens: int, device: torch.device) -> Tensor:
    """The same bits of int64, for any device."""
    state_BV = torch.arange(1, num_tokens + 1, device=device) * _signed(_GAMMA)
    signed = [_signed(stream) for stream in streams]
    state_BV = state_BV + torch.tensor(signed, device=device, dtype=torch.int64)[:, None]
    for shift, factor in zip(_SHIFTS, _FACTORS):
        state_BV.bitwise_xor_(_shifted(state_BV, shift)).mul_(_signed(factor))
    state_BV.bitwise_xor_(_shifted(state_BV, _SHIFTS[-1]))
    uniform_BV = _shifted(state_BV, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform_BV.log_().neg_()


def _shifted(values: Tensor, shift: int) -> Tensor:
    """Shifted right with zeros coming in; int64 would copy the sign."""
    return (values >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number; int64 products wrap as unsigned ones do."""
    return value - (1 << 64) if value >> 63 else value


def _finalise(value: int) -> int:
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK
    return value ^ (value >> 31)
