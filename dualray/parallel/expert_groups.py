"""The routed experts of one worker: their optimizer, their copies elsewhere, and how they move.

Everything is kept layer by layer, so that a migration touches nothing but the layers that change.
It happens between steps, among living processes. A layer's new experts are built aside: weights
come from the former homes over the expert ranks of the stage, master weights and moments from
whoever owns a part of them, mirrors and replicas included. When every worker has everything of the
layer, all put it into place and let go of the old; so a migration needs memory for one layer more,
and every layer is whole, in its old place or its new one, whoever is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from dualray.model.init import LogicalSlice, expert_slices
from dualray.model.moe import Experts
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Groups
from dualray.parallel.held import HeldStages, expert_prefix
from dualray.parallel.optimizer import (
    Joined,
    Optimizer,
    OptimizerConfig,
    ParamGroup,
    main_grad,
    make_optimizer,
)
from dualray.parallel.redundant import Copies, from_former_homes
from dualray.parallel.reshard import Wanted, assemble, cut, swap_ranges, wanted
from dualray.parallel.slots import ExpertPlacement, differ_in
from dualray.parallel.state_place import Shelf, StateBytes, StatePlace
from dualray.parallel.weight_grads import attach_main_grads


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a migration took on one worker."""

    layers: tuple[int, ...]
    """Those of this worker that changed."""
    received_bytes: int
    """What other workers sent to it."""
    seconds: float


@dataclass(kw_only=True)
class _Layer:
    experts: Experts
    copies: Copies
    optimizer: Optimizer | None
    shelf: Shelf | None = None
    """Memory of the optimizer's state while that is away."""


class ExpertGroups:
    """One worker's expert groups. Its methods are collectives over the copies of its stages."""

    def __init__(
        self,
        held: HeldStages,
        groups: Groups,
        placement: ExpertPlacement,
        rank: int,
        exchange: Exchange,
        config: OptimizerConfig | None,
    ) -> None:
        """`rank` is the expert rank; without `config` nothing is trained."""
        self.placement = placement
        self._held, self._groups, self._rank = held, groups, rank
        self._exchange, self._config = exchange, config
        self._away: Callable[[_Layer], Shelf] | None = None
        self._forgotten = False
        self._layers = {
            layer: self._layer(layer, experts, placement)
            for layer, experts in sorted(held.experts().items())
        }
        self.optimizer = Joined([])
        self._join()

    def send_gradients_home(self) -> None:
        for layer in self._layers.values():
            layer.copies.send_gradients_home()

    def take_weights(self) -> None:
        for layer in self._layers.values():
            layer.copies.take_weights()

    def weights_were_written(self) -> None:
        for layer in self._layers.values():
            layer.copies.weights_were_written()

    def move(self, placement: ExpertPlacement) -> Moved:
        """Let experts be where `placement` says. Every worker of the stages' copies must call it.

        Raises what the exchange raises if a worker is lost. `placement` of this object says then
        which layers have moved.
        """
        started = time.perf_counter()
        changed = [layer for layer in self._layers if differ_in(layer, self.placement, placement)]
        put: list[int] = []
        received = 0
        try:
            for layer in changed:
                fresh, num_bytes = self._moved(layer, self._layers[layer], placement)
                # Nobody changes anything before all have everything.
                dist.barrier(group=self._groups.dense)
                self._put(layer, fresh)
                put.append(layer)
                received += num_bytes
        except BaseException:
            self.placement = self.placement.with_layers(put, placement)
            raise
        finally:
            self._join()
        # Layers of other stages, too: the map is the same on all workers.
        self.placement = placement
        return Moved(
            layers=tuple(changed),
            received_bytes=received,
            seconds=time.perf_counter() - started,
        )

    def put_state_away(self, place: StatePlace, *, leave_host: bool = True) -> StateBytes:
        """See `Shelf`. Experts can move meanwhile, and what they have of state moves with them."""

        def away(layer: _Layer) -> Shelf:
            assert layer.optimizer is not None
            grads = [main_grad(weight) for weight in layer.experts.parameters()]
            return Shelf(place, layer.optimizer.state_tensors(), grads, leave_host=leave_host)

        size = StateBytes()
        self._away, self._forgotten = away, place is StatePlace.DROP
        for layer in self._layers.values():
            if layer.optimizer is not None:
                layer.shelf = away(layer)
                size += layer.shelf.size
        return size

    def bring_state_back(self) -> None:
        """Take the memory of state and gradients again, and what was parked."""
        self._away, self._forgotten = None, False
        for layer in self._layers.values():
            if layer.shelf is not None:
                layer.shelf.bring_back()
                layer.shelf = None

    def _put(self, layer: int, fresh: _Layer) -> None:
        former = self._layers[layer].optimizer
        if former is not None:
            former.close()
        self._layers[layer] = fresh
        self._held.put_experts(layer, fresh.experts)

    def _join(self) -> None:
        parts = [layer.optimizer for layer in self._layers.values()]
        self.optimizer.parts[:] = [part for part in parts if part is not None]

    def _layer(self, layer: int, experts: Experts, placement: ExpertPlacement) -> _Layer:
        group = self._groups.dispatch[0].rows
        copies = Copies(layer, experts, placement, self._rank, self._exchange, group)
        if self._config is None:
            return _Layer(experts=experts, copies=copies, optimizer=None)
        attach_main_grads(experts.parameters())
        ranks = self._groups.expert_ranks
        params = [(expert_prefix(layer) + name, home) for name, home in copies.homes().items()]
        of_homes = ParamGroup(
            params=params,
            process_group=self._groups.expert if len(ranks) > 1 else None,
            group_ranks=ranks,
        )
        optimizer = make_optimizer([of_homes], self._config)
        return _Layer(experts=experts, copies=copies, optimizer=optimizer)

    def _moved(self, layer: int, former: _Layer, placement: ExpertPlacement) -> tuple[_Layer, int]:
        """The layer as it will be, beside what it is, and the bytes that came for it."""
        experts, num_bytes = self._moved_experts(layer, former.experts, placement)
        fresh = self._layer(layer, experts, placement)
        if former.optimizer is None or fresh.optimizer is None:
            return fresh, num_bytes
        if not self._forgotten:
            if former.shelf is not None:
                former.shelf.bring_back()
            num_bytes += self._move_state(layer, former, fresh)
        if self._away is not None:
            fresh.shelf = self._away(fresh)
        return fresh, num_bytes

    def _move_state(self, layer: int, former: _Layer, fresh: _Layer) -> int:
        """Let the fresh layer's optimizer have the former one's state; bytes that came for it."""
        have_of, want_of, experts = former.optimizer, fresh.optimizer, fresh.experts
        assert have_of is not None
        assert want_of is not None
        names = expert_slices(former.experts, expert_prefix(layer))
        have = [
            (part.name, kind, start, values)
            for name, kind, first, flat in have_of.state_pieces()
            for part, start, values in cut(names[name], first, flat)
        ]
        fresh_names = expert_slices(experts, expert_prefix(layer))
        want = _wanted_state(want_of, fresh_names)
        like = torch.empty(
            0,
            dtype=torch.promote_types(next(experts.parameters()).dtype, torch.float32),
            device=next(experts.parameters()).device,
        )
        found, state_bytes = swap_ranges(have, want, self._exchange, self._groups.dense, like)

        def read(name: str, kind: str, start: int, count: int) -> Tensor:
            def fetch(part: LogicalSlice, low: int, length: int) -> Tensor:
                return found[part.name, kind, low, length]

            return assemble(fresh_names[name], start, count, fetch)

        want_of.load_state(read, step_count=have_of.step_count)
        return state_bytes

    @torch.no_grad()
    def _moved_experts(
        self, layer: int, former: Experts, placement: ExpertPlacement
    ) -> tuple[Experts, int]:
        route = from_former_homes(self.placement, placement, layer, self._rank)
        ids = placement.held[layer][self._rank]
        with torch.device("meta"):
            experts = Experts(self._held.config, ids)
        experts.num_homes = placement.num_homes[layer][self._rank]
        stays = {slot: former.ids.index(e) for slot, e in enumerate(ids) if e in former.ids}
        received = 0
        for name, weight in former.named_parameters(recurse=False):
            moved = weight.new_empty(len(ids), *weight.shape[1:])
            moved[list(stays)] = weight[list(stays.values())]
            label = f"moving experts {layer} {name}"
            group = self._groups.dispatch[0].rows
            arrived = route.carry(weight, self._exchange, group, label)
            moved[route.places] = arrived.view(-1, *weight.shape[1:])
            setattr(experts, name, Parameter(moved, requires_grad=weight.requires_grad))
            received += arrived.nbytes
        return experts, received


def _wanted_state(optimizer: Optimizer, slices: dict[str, list[LogicalSlice]]) -> list[Wanted]:
    """The ranges that an optimizer reads when it loads its state."""
    ranges: dict[Wanted, None] = {}

    def note(name: str, kind: str, start: int, count: int) -> Tensor:
        ranges.update(dict.fromkeys(wanted(slices[name], kind, start, count)))
        return torch.zeros(count)

    optimizer.load_state(note, step_count=0)
    return list(ranges)
