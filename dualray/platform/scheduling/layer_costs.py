"""From what stages cost to what layers cost, and back: how another cut of the model would do.

A stage's measured time is divided over its layers in proportion to their operations; what the
last stage has besides (head, MTP modules) is one more part, which stays there. So the parts of
the measured cut add up to what was measured, and only what is moved is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dualray.model.config import ModelConfig
from dualray.model.formulas import head_flops, layer_flops
from dualray.schedule.simulate import Costs


@dataclass(frozen=True, kw_only=True)
class Part:
    """Seconds that a part of the model takes for one micro-batch."""

    forward: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0
    saving: float = 0.0
    """What an overlapped pair saves of a forward and a backward."""

    def __add__(self, other: Part) -> Part:
        return Part(
            forward=self.forward + other.forward,
            input_grad=self.input_grad + other.input_grad,
            weight_grad=self.weight_grad + other.weight_grad,
            saving=self.saving + other.saving,
        )

    @property
    def total(self) -> float:
        """Forward and backward, one after the other."""
        return self.forward + self.input_grad + self.weight_grad

    @property
    def costs(self) -> Costs:
        """As the simulator takes it; the longer half of a pair is never hidden."""
        saving = min(self.saving, self.forward, self.input_grad + self.weight_grad)
        return Costs(
            forward=self.forward,
            input_grad=self.input_grad,
            weight_grad=self.weight_grad,
            overlapped=self.total - saving,
        )


def parts_of(
    costs: Sequence[Costs], layers: Sequence[int], model: ModelConfig, seq_len: int
) -> list[Part]:
    """One part a layer, and a last one for what the last stage has besides its layers.

    `costs` and `layers` are those of the measured stages. Only layers that exchange rows between
    workers save anything in pairs.
    """
    work, exchanges = _work(model, seq_len), _exchanges(model)
    parts: list[Part] = []
    for units, cost in zip(_units(layers), costs, strict=True):
        operations = sum(work[unit] for unit in units)
        exchanging = sum(exchanges[unit] for unit in units)
        saving = max(0.0, cost.forward + cost.backward - cost.overlapped)
        for unit in units:
            share = work[unit] / operations
            parts.append(
                Part(
                    forward=cost.forward * share,
                    input_grad=cost.input_grad * share,
                    weight_grad=cost.weight_grad * share,
                    saving=saving * exchanges[unit] / exchanging if exchanging else 0.0,
                )
            )
    return parts


def stages_of(parts: Sequence[Part], layers: Sequence[int]) -> list[Part]:
    """What stages of so many layers would cost."""
    return [sum((parts[unit] for unit in units), start=Part()) for units in _units(layers)]


@dataclass(frozen=True, kw_only=True)
class Sized:
    """Parts of one micro-batch size, in sequences."""

    size: int
    parts: Sequence[Part]


def at_size(measured: Sequence[Sized], size: int) -> list[Part]:
    """Parts of micro-batches of `size` sequences, by a line through one or two measured sizes.

    A line has neither a negative start nor a negative slope, whatever noise says. One size alone
    answers for itself only.
    """
    first, *others = measured
    if size == first.size:
        return list(first.parts)
    (second,) = others
    return [
        Part(
            **{
                name: _line(first.size, value, second.size, getattr(other, name), size)
                for name, value in vars(part).items()
            }
        )
        for part, other in zip(first.parts, second.parts, strict=True)
    ]


def _line(x1: int, y1: float, x2: int, y2: float, x: int) -> float:
    slope = (y2 - y1) / (x2 - x1)
    slope = min(max(slope, 0.0), y1 / x1)
    return y1 + slope * (x - x1)


def _units(layers: Sequence[int]) -> list[range]:
    """Numbers of the parts of each stage."""
    ends = list(accumulate(layers))
    ends[-1] += 1
    return [range(start, end) for start, end in zip([0, *ends], ends)]


def _work(model: ModelConfig, seq_len: int) -> list[float]:
    keys = (seq_len + 1) / 2
    first_mtp = model.num_hidden_layers
    mtp = range(first_mtp, first_mtp + model.num_nextn_predict_layers)
    last = head_flops(model) + sum(layer_flops(model, layer, keys) for layer in mtp)
    return [*(layer_flops(model, layer, keys) for layer in range(first_mtp)), last]


def _exchanges(model: ModelConfig) -> list[int]:
    """Layers with routed experts in each part."""
    layers = range(model.num_hidden_layers)
    return [*(int(model.is_moe(layer)) for layer in layers), model.num_nextn_predict_layers]
