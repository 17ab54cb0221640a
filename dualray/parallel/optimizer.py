"""The optimizer interface and its configuration.

Gradients are sums and live in `param.main_grad` (fp32, or float64 for float64 parameters);
`param.grad` stays None outside `step`. A train step calls reduce, squared_norm, scale and
step, in this order; clipping stays outside because its norm spans the whole world.

Parameters below fp32 get an fp32 master, which is what AdamW moves; the parameter is its
rounding. Others are their own master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from dualray.errors import ConfigError

STATE_KINDS = ("exp_avg", "exp_avg_sq")

Piece = tuple[str, str, int, Tensor]
"""(parameter name, kind, start, 1-D values): kind is exp_avg, exp_avg_sq or master."""

Read = Callable[[str, str, int, int], Tensor]
"""read(parameter name, kind, start, count) gives the 1-D values of that flat range."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, and AdamW's constants (arXiv 2412.19437, 4.2)."""

    kind: str = "zero1"
    """`zero1` (DeepSpeed, states cut over the ranks that share a parameter) or `adamw`."""
    beta1: float = 0.9
    """Decay of the first moment, 0 to below 1."""
    beta2: float = 0.95
    """Decay of the second moment, 0 to below 1."""
    eps: float = 1e-8
    """Added to the square root of the second moment; above 0."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate; never on 1-D parameters. At least 0."""

    def __post_init__(self) -> None:
        if self.kind not in ("zero1", "adamw"):
            raise ConfigError(
                f"train.optimizer is {self.kind} and must be zero1 or adamw",
                hint="set train.optimizer to zero1",
            )
        for name, default in (("beta1", 0.9), ("beta2", 0.95)):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"train.{name} is {getattr(self, name)} and must be at least 0 and below 1",
                    hint=f"set train.{name} to {default}",
                )
        if not 0 < self.eps < float("inf"):
            raise ConfigError(
                f"train.eps is {self.eps} and must be above 0", hint="set train.eps to 1e-8"
            )
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(
                f"train.weight_decay is {self.weight_decay} and must be at least 0",
                hint="set train.weight_decay to 0.1",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ParamGroup:
    """Parameters that the same ranks hold copies of.

    Every rank of `group_ranks` builds the group with the same names in the same order, and
    lists its groups in an order that agrees with its peers', since each group reduces in turn.
    """

    params: Sequence[tuple[str, Parameter]]
    """(name, parameter); names are unique over all groups of the worker."""
    process_group: dist.ProcessGroup | None
    """Over `group_ranks`; None if this rank is the only holder."""
    group_ranks: tuple[int, ...]
    """World ranks of the holders, ascending."""
    count: bool = True
    """False if another group owns these logical parameters: not counted in the norm, not saved.
    All ranks of the group agree on it."""

    def __post_init__(self) -> None:
        size = 1 if self.process_group is None else self.process_group.size()
        assert size == len(self.group_ranks), (size, self.group_ranks)

    @property
    def position(self) -> int:
        """This rank's place among the holders."""
        return 0 if self.process_group is None else self.process_group.rank()

    @property
    def size(self) -> int:
        return len(self.group_ranks)


class Optimizer(Protocol):
    """What a train step and a checkpoint ask of an optimizer."""

    @property
    def step_count(self) -> int:
        """Optimizer steps taken, which AdamW's bias correction follows."""
        ...

    def reduce(self) -> None:
        """Sums main gradients over each group's ranks. A collective on every group."""
        ...

    def squared_norm(self) -> Tensor:
        """float64 scalar: this rank's share of the squared norm of the reduced gradients.

        Summed over the world it counts each logical parameter once. Valid after `reduce`.
        """
        ...

    def scale(self, factor: float) -> None:
        """Multiplies the reduced gradients, for clipping."""
        ...

    def step(self, lr: float) -> None:
        """One AdamW step; parameters are equal on all holders after it, main_grad is zero."""
        ...

    def state_pieces(self) -> Iterator[Piece]:
        """Flat ranges of state that this rank owns; over the world each element comes once."""
        ...

    def load_state(self, read: Read, *, step_count: int) -> None:
        """Takes the state back, at any layout. The parameters must hold their values already:
        masters of fp32 and float64 parameters are taken from them and not read."""
        ...

    def refresh_masters(self) -> None:
        """Makes masters follow parameters that somebody else wrote (a warm start)."""
        ...

    def state_tensors(self) -> Iterator[Tensor]:
        """Masters and moments as they lie in memory; a parameter that is its own master is none."""
        ...

    def close(self) -> None:
        """Lets go of the parameters and process groups, before a rebuild."""
        ...


class Joined:
    """Several optimizers as one, which act in turn. Without parts it still counts its steps."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        self.step_count = 0

    def reduce(self) -> None:
        for part in self.parts:
            part.reduce()

    def squared_norm(self) -> Tensor:
        # A scalar on the CPU joins those of any device.
        zero = torch.zeros((), dtype=torch.float64)
        return sum((part.squared_norm() for part in self.parts), start=zero)

    def scale(self, factor: float) -> None:
        for part in self.parts:
            part.scale(factor)

    def step(self, lr: float) -> None:
        for part in self.parts:
            part.step(lr)
        self.step_count += 1

    def state_pieces(self) -> Iterator[Piece]:
        for part in self.parts:
            yield from part.state_pieces()

    def load_state(self, read: Read, *, step_count: int) -> None:
        self.step_count = step_count
        for part in self.parts:
            part.load_state(read, step_count=step_count)

    def refresh_masters(self) -> None:
        for part in self.parts:
            part.refresh_masters()

    def state_tensors(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.state_tensors()

    def close(self) -> None:
        for part in self.parts:
            part.close()
        self.parts.clear()


def make_optimizer(groups: Sequence[ParamGroup], config: OptimizerConfig) -> Optimizer:
    """Builds `config.kind` over this rank's groups.

    zero1 moves each parameter's storage into a flat buffer, so take views of parameters
    afterwards. Raises ConfigError for zero1 on float64 parameters, which it has no masters for.
    """
    # Imported here: both stand on this file, and deepspeed is only loaded where it is used.
    groups = [group for group in groups if group.params]
    if config.kind == "adamw":
        from dualray.parallel.adamw import AdamW

        return AdamW(groups, config)
    if any(param.dtype == torch.float64 for group in groups for _, param in group.params):
        raise ConfigError(
            "train.optimizer is zero1 and train.dtype is float64, but zero1 keeps fp32 masters",
            hint="set train.optimizer to adamw",
        )
    from dualray.parallel.zero import Zero1

    return Zero1(groups, config)


def decay_of(param: Parameter, config: OptimizerConfig) -> float:
    """Weight decay of one parameter: none for norms and biases, which are 1-D."""
    return config.weight_decay if param.dim() >= 2 else 0.0


def main_grad(param: Parameter) -> Tensor:
    """The accumulated gradient of `param`; the executor allocates it, in param's shape."""
    grad = param.main_grad  # pyrefly: ignore[missing-attribute]
    assert grad.shape == param.shape, (grad.shape, param.shape)
    return grad


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Scalar sum of squares, accumulated in float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    return total
