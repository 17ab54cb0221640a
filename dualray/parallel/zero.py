"""ZeRO-1 through DeepSpeed's optimizer, used as a library; the only file that imports deepspeed.

DeepSpeed cuts masters and moments of a group of parameters over the ranks that hold them,
reduces gradients into the owner's slice, and gathers the stepped parameters. Its own way to
separate expert parameters divides their gradients by the wrong group's size in places, so
each `ParamGroup` (and dtype) gets an optimizer of its own instead, and nothing is averaged.

What is switched off: averaging, clipping, overflow checks, norms, timers and the backward hooks
(gradients arrive in `main_grad`, not through autograd). Clipping needs the norm over all
pipeline ranks, so `scale` works on the reduced slices between DeepSpeed's reduce and step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from dualray.parallel.adamw import BUCKET_NUMEL, AdamW, init_state, new_adamw
from dualray.parallel.optimizer import (
    STATE_KINDS,
    Joined,
    Optimizer,
    OptimizerConfig,
    ParamGroup,
    Piece,
    Read,
    decay_of,
    main_grad,
    sum_of_squares,
)


class Zero1(Joined):
    """One sharded optimizer per group and dtype; groups that only this rank holds stay plain."""

    def __init__(self, groups: Sequence[ParamGroup], config: OptimizerConfig) -> None:
        parts: list[Optimizer] = []
        shared = [group for group in groups if group.size > 1]
        if shared:
            _attach_deepspeed(shared[0].params[0][1].device)
        for group in groups:
            if group.size == 1:
                # A cut over one rank is no cut.
                parts.append(AdamW([group], config))
                continue
            dtypes = dict.fromkeys(param.dtype for _, param in group.params)
            parts += [_Sharded(group, dtype, config) for dtype in dtypes]
        super().__init__(parts)


class _Sharded:
    """DeepSpeedZeroOptimizer over the parameters of one dtype of one group."""

    def __init__(self, group: ParamGroup, dtype: torch.dtype, config: OptimizerConfig) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer

        self._group = group
        self.step_count = 0
        named = [(name, param) for name, param in group.params if param.dtype == dtype]
        self._names = {param: name for name, param in named}
        by_decay: dict[float, list[Parameter]] = {}
        for _, param in named:
            by_decay.setdefault(decay_of(param, config), []).append(param)
        self._adamw = new_adamw(by_decay, config)
        numels = [param.numel() for _, param in named]
        self._zero: Any = DeepSpeedZeroOptimizer(
            self._adamw,
            param_names=self._names,
            timers=NoopTimer(),
            optimizer_params={},
            partition_grads=False,
            # Without it DeepSpeed takes another, averaging route.
            contiguous_gradients=True,
            reduce_bucket_size=max(max(numels), min(sum(numels), BUCKET_NUMEL)),
            dp_process_group=group.process_group,
            gradient_average=False,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            clip_grad=0.0,
            check_grad_overflow=False,
            compute_grad_norm=False,
        )
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        for partition in self._partitions():
            init_state(self._adamw, partition)

    def reduce(self) -> None:
        for param in self._names:
            # DeepSpeed re-points the gradient it is given; an alias keeps main_grad's storage.
            alias = main_grad(param).detach()
            if self._zero.use_grad_accum_attribute:
                param.grad_accum = alias  # pyrefly: ignore[missing-attribute]
            else:
                param.grad = alias
        self._zero.setup_buckets()
        self._zero.reduce_gradients()

    def squared_norm(self) -> Tensor:
        device = self._partitions()[0].device
        return sum_of_squares(self._reduced() if self._group.count else [], device)

    def scale(self, factor: float) -> None:
        torch._foreach_mul_(self._reduced(), factor)

    def step(self, lr: float) -> None:
        self._zero.set_lr(lr)
        self._zero.step()
        torch._foreach_zero_([main_grad(param) for param in self._names])
        self.step_count += 1

    def state_pieces(self) -> Iterator[Piece]:
        if not self._group.count:
            return
        for param, start, partition, offset, count in self._owned():
            name, state = self._names[param], self._adamw.state[partition]
            for kind in STATE_KINDS:
                yield name, kind, start, state[kind].narrow(0, offset, count)
            if param.dtype != torch.float32:
                yield name, "master", start, partition.detach().narrow(0, offset, count)

    @torch.no_grad()
    def load_state(self, read: Read, *, step_count: int) -> None:
        self.step_count = step_count
        self.refresh_masters()
        for partition in self._partitions():
            self._adamw.state[partition]["step"].fill_(step_count)
        for param, start, partition, offset, count in self._owned():
            name, state = self._names[param], self._adamw.state[partition]
            for kind in STATE_KINDS:
                state[kind].narrow(0, offset, count).copy_(read(name, kind, start, count))
            if param.dtype != torch.float32:
                partition.narrow(0, offset, count).copy_(read(name, "master", start, count))

    def refresh_masters(self) -> None:
        self._zero.refresh_fp32_params()

    def state_tensors(self) -> Iterator[Tensor]:
        for partition in self._partitions():
            yield partition
            yield from (self._adamw.state[partition][kind] for kind in STATE_KINDS)

    def close(self) -> None:
        self._zero.destroy()
        self._adamw.state.clear()
        for param in self._names:
            param.grad = None
            param.grad_accum = None  # pyrefly: ignore[missing-attribute]

    def _partitions(self) -> list[Tensor]:
        """This rank's flat masters, one for each weight decay; padded at the end with zeros."""
        return self._zero.single_partition_of_fp32_groups

    def _reduced(self) -> list[Tensor]:
        """This rank's slices of the summed gradients, padding included."""
        return [grad for grads in self._zero.averaged_gradients.values() for grad in grads]

    def _owned(self) -> Iterator[tuple[Parameter, int, Tensor, int, int]]:
        """(parameter, start in it, partition, start in that, count) of each range we own."""
        for index, partition in enumerate(self._partitions()):
            first = partition.numel() * self._group.position
            position = 0
            for param in self._zero.bit16_groups[index]:
                begin, end = (
                    max(position, first),
                    min(position + param.numel(), first + len(partition)),
                )
                if begin < end:
                    yield param, begin - position, partition, begin - first, end - begin
                position += param.numel()


def _attach_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed for `device` and gives it today's torch.distributed world.

    Its communicator is a module global that outlives process groups, so it is renewed each time.
    """
    if device.type == "cpu":
        # Read once, at import. Otherwise it looks for vendors' devices, and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.comm.comm as communicator

    _import_muon_uncompiled()
    # A shared-memory op that would be compiled for 44 s at the first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    communicator.cdb = None
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    if hasattr(dist, "all_gather_single"):
        # torch 2.13 renamed the collective and warns at every use of the old name.
        communicator.cdb.all_gather_function = dist.all_gather_single  # pyrefly: ignore


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, which its reduction asks about, without torch.compile.

    Decorating its kernels would load the Inductor, 1.8 s and 115 MB in every worker (measured
    on 2 cores with torch 2.13), and warn. AdamW never runs them.
    """
    from deepspeed.runtime import compiler

    real = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = real
