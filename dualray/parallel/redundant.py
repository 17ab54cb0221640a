"""Redundant copies of experts: their gradients go home, their weights come from there.

The optimizer knows homes alone. Before it sums gradients over mirrors and replicas, copies send
theirs to the home, which adds them in the order of the ranks; after it has moved the weights,
homes send these to the copies. Both are exchanges among the expert ranks of a stage whose sizes
everybody knows from the placement. s slots of a layer here, H of them homes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from dualray.model.moe import Experts
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Group
from dualray.parallel.optimizer import main_grad
from dualray.parallel.slots import ExpertPlacement


@dataclass(frozen=True, kw_only=True)
class Route:
    """What one rank sends to others and gets from them, by local slots."""

    send: tuple[tuple[int, ...], ...]
    """`send[r]`: slots whose experts go to rank r, in the order in which r expects them."""
    receive: tuple[tuple[int, ...], ...]
    """`receive[r]`: slots that what comes from rank r belongs into, in its order."""

    def carry(self, rows_sX: Tensor, exchange: Exchange, group: Group, name: str) -> Tensor:
        """The rows of the slots to send, swapped for those to receive, in rank order."""
        sent = [slot for slots in self.send for slot in slots]
        return exchange.swap(
            rows_sX[sent].flatten(1),
            [len(slots) for slots in self.receive],
            [len(slots) for slots in self.send],
            group,
            name,
        )

    @property
    def places(self) -> list[int]:
        """Slots that arriving rows belong into, in their order."""
        return [slot for slots in self.receive for slot in slots]

    def reversed(self) -> Route:
        return Route(send=self.receive, receive=self.send)


def from_homes(placement: ExpertPlacement, layer: int, rank: int) -> Route:
    """How weights get from homes to copies."""
    experts = placement.held[layer]
    lacking = [placement.copies(layer, other) for other in range(len(experts))]
    return _route(placement, layer, rank, lacking, experts[rank])


def from_former_homes(
    former: ExpertPlacement, placement: ExpertPlacement, layer: int, rank: int
) -> Route:
    """How weights get to where they are wanted next, unless they are there already.

    Slots to send are those of `former`, slots to receive into those of `placement`.
    """
    lacking = [
        tuple(expert for expert in then if expert not in now)
        for now, then in zip(former.held[layer], placement.held[layer], strict=True)
    ]
    return _route(former, layer, rank, lacking, placement.held[layer][rank])


def _route(
    homes: ExpertPlacement,
    layer: int,
    rank: int,
    lacking: Sequence[Sequence[int]],
    into: Sequence[int],
) -> Route:
    """`lacking[r]` are experts that rank r gets from their homes, `into` this rank's slots."""
    home_rank = homes.home_ranks(layer)
    own = {expert: slot for slot, expert in enumerate(homes.held[layer][rank])}
    place = {expert: slot for slot, expert in enumerate(into)}
    return Route(
        send=tuple(tuple(own[e] for e in experts if home_rank[e] == rank) for experts in lacking),
        receive=tuple(
            tuple(place[e] for e in lacking[rank] if home_rank[e] == other)
            for other in range(len(lacking))
        ),
    )


class Copies:
    """Keeps one layer's copies and homes together. A collective over its expert ranks.

    Where no rank has a copy, nothing is sent.
    """

    def __init__(
        self,
        layer: int,
        experts: Experts,
        placement: ExpertPlacement,
        rank: int,
        exchange: Exchange,
        group: Group,
    ) -> None:
        self._layer, self._experts = layer, experts
        self._exchange, self._group = exchange, group
        self._route = from_homes(placement, layer, rank)
        self._exist = any(placement.copies(layer, r) for r in range(placement.num_ranks))
        self._homes: list[tuple[Parameter, Parameter]] = []

    def homes(self) -> dict[str, Parameter]:
        """What the optimizer is given of the layer's weights, by name: all if all are homes."""
        given, count = {}, self._experts.num_homes
        for name, weight in self._experts.named_parameters(recurse=False):
            if count == len(weight):
                given[name] = weight
            elif count:
                home = Parameter(weight.detach()[:count])
                home.main_grad = main_grad(weight)[:count]  # pyrefly: ignore[missing-attribute]
                self._homes.append((weight, home))
                given[name] = home
        return given

    @torch.no_grad()
    def send_gradients_home(self) -> None:
        """Add the copies' main gradients to their homes' and clear them."""
        if not self._exist:
            return
        back = self._route.reversed()
        for name, weight in self._experts.named_parameters(recurse=False):
            grad = main_grad(weight)
            arrived = back.carry(grad, self._exchange, self._group, self._label("gradients", name))
            counts = [len(slots) for slots in back.receive]
            for slots, part in zip(back.receive, arrived.split(counts), strict=True):
                grad[list(slots)] += part.view(-1, *grad.shape[1:])
            grad[self._experts.num_homes :].zero_()

    @torch.no_grad()
    def take_weights(self) -> None:
        """Let the weights be those of the homes, which the optimizer has moved."""
        for weight, home in self._homes:
            # An optimizer may keep what it was given in a storage of its own.
            if home.data_ptr() != weight.data_ptr():
                weight[: len(home)].copy_(home)
        if not self._exist:
            return
        for name, weight in self._experts.named_parameters(recurse=False):
            label = self._label("weights", name)
            arrived = self._route.carry(weight, self._exchange, self._group, label)
            weight[self._route.places] = arrived.view(-1, *weight.shape[1:])

    @torch.no_grad()
    def weights_were_written(self) -> None:
        """Somebody else wrote the weights: let the optimizer's be the same."""
        for weight, home in self._homes:
            home.copy_(weight[: len(home)])

    def _label(self, what: str, name: str) -> str:
        return f"copies' {what} {self._layer} {name}"
