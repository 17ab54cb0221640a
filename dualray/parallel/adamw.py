"""Plain AdamW: all-reduced gradients, full state everywhere; the twin that tests ZeRO-1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from dualray.parallel.optimizer import (
    STATE_KINDS,
    OptimizerConfig,
    ParamGroup,
    Piece,
    Read,
    decay_of,
    main_grad,
    sum_of_squares,
)

BUCKET_NUMEL = 2**25
"""Elements reduced in one collective: 128 MiB of fp32 staging."""


class AdamW:
    """The `Optimizer` without any sharding; groups that only this rank holds reduce nothing."""

    def __init__(self, groups: Sequence[ParamGroup], config: OptimizerConfig) -> None:
        self._groups = tuple(groups)
        self.step_count = 0
        self._masters: dict[str, Tensor] = {}
        by_decay: dict[float, list[Tensor]] = {}
        for group in self._groups:
            for name, param in group.params:
                assert name not in self._masters, name
                # Same storage when no rounding lies between the two.
                master = param.detach() if _own_master(param) else param.detach().float()
                self._masters[name] = master
                by_decay.setdefault(decay_of(param, config), []).append(master)
        self._adamw = new_adamw(by_decay, config)
        for master in self._masters.values():
            init_state(self._adamw, master)

    def reduce(self) -> None:
        for group in self._groups:
            if group.process_group is not None:
                for grads in _buckets([main_grad(param) for _, param in group.params]):
                    _all_reduce(grads, group.process_group)

    def squared_norm(self) -> Tensor:
        counted = [
            main_grad(param)
            for group in self._groups
            if group.count and group.position == 0
            for _, param in group.params
        ]
        return sum_of_squares(counted, self._device)

    def scale(self, factor: float) -> None:
        for grads in self._grads_by_dtype():
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for param_group in self._adamw.param_groups:
            param_group["lr"] = lr
        for name, param in self._params():
            self._masters[name].grad = main_grad(param)
        self._adamw.step()
        for name, param in self._params():
            self._masters[name].grad = None
            if not _own_master(param):
                param.copy_(self._masters[name])
        for grads in self._grads_by_dtype():
            torch._foreach_zero_(grads)
        self.step_count += 1

    def state_pieces(self) -> Iterator[Piece]:
        for group in self._groups:
            if not group.count:
                continue
            for name, param in group.params:
                # All holders have it all; cutting it evenly spreads the writing.
                start = param.numel() * group.position // group.size
                end = param.numel() * (group.position + 1) // group.size
                if start == end:
                    continue
                state = self._adamw.state[self._masters[name]]
                for kind in STATE_KINDS:
                    yield name, kind, start, state[kind].view(-1)[start:end]
                if not _own_master(param):
                    yield name, "master", start, self._masters[name].view(-1)[start:end]

    @torch.no_grad()
    def load_state(self, read: Read, *, step_count: int) -> None:
        self.step_count = step_count
        for name, param in self._params():
            master = self._masters[name]
            state = self._adamw.state[master]
            state["step"].fill_(step_count)
            for kind in STATE_KINDS:
                state[kind].view(-1).copy_(read(name, kind, 0, param.numel()))
            if not _own_master(param):
                master.view(-1).copy_(read(name, "master", 0, param.numel()))

    @torch.no_grad()
    def refresh_masters(self) -> None:
        for name, param in self._params():
            self._masters[name].copy_(param)

    def state_tensors(self) -> Iterator[Tensor]:
        for name, param in self._params():
            master = self._masters[name]
            yield from (self._adamw.state[master][kind] for kind in STATE_KINDS)
            if not _own_master(param):
                yield master

    def close(self) -> None:
        self._groups = ()
        self._masters.clear()
        self._adamw.state.clear()

    def _params(self) -> Iterator[tuple[str, Parameter]]:
        for group in self._groups:
            yield from group.params

    @property
    def _device(self) -> torch.device:
        return next((param.device for _, param in self._params()), torch.device("cpu"))

    def _grads_by_dtype(self) -> Iterable[list[Tensor]]:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for _, param in self._params():
            grad = main_grad(param)
            by_dtype.setdefault(grad.dtype, []).append(grad)
        return by_dtype.values()


def new_adamw(
    by_decay: Mapping[float, Sequence[Tensor]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """torch's fused AdamW over the tensors of each weight decay; `lr` is set at each step.

    Without any, as in a worker that only serves, it has one group of nothing.
    """
    groups = [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]
    return torch.optim.AdamW(
        groups or [{"params": []}],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def init_state(adamw: torch.optim.AdamW, param: Tensor) -> None:
    """Zero moments, laid out as torch's fused AdamW would at its first step.

    Made at once, so that state can be saved and loaded before any step.
    """
    adamw.state[param] = {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        **{kind: torch.zeros_like(param, requires_grad=False) for kind in STATE_KINDS},
    }


def _own_master(param: Parameter) -> bool:
    return param.dtype in (torch.float32, torch.float64)


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, each of at most BUCKET_NUMEL unless a single one is more."""
    bucket: list[Tensor] = []
    numel = 0
    for grad in grads:
        if bucket and (numel + grad.numel() > BUCKET_NUMEL or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, numel = [], 0
        bucket.append(grad)
        numel += grad.numel()
    if bucket:
        yield bucket


def _all_reduce(grads: list[Tensor], process_group: dist.ProcessGroup) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat, group=process_group)
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])
