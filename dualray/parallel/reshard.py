"""Optimizer state from those who have it to those who want it, range by range.

A parameter of ours may hold several logical tensors back to back, and what a rank owns of it may
begin and end anywhere. Here state is cut at logical tensors, so that it can be spoken of in other
arrangements, in checkpoints, and by other workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.model.init import LogicalSlice
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Group
from dualray.parallel.optimizer import Piece

Wanted = tuple[str, str, int, int]
"""(logical tensor, kind, start, count): a flat range of one kind of state."""

Fetch = Callable[[LogicalSlice, int, int], Tensor]
"""fetch(slice, start, count): 1-D values of a range of a logical tensor."""


def cut(
    slices: Sequence[LogicalSlice], start: int, values: Tensor
) -> Iterator[tuple[LogicalSlice, int, Tensor]]:
    """The parts of a parameter's flat range [start, start + len) that fall in each slice: the
    slice, the part's start in it, its values."""
    for part, part_start, offset, count in _parts(slices, start, values.numel()):
        yield part, part_start, values[offset : offset + count]


def assemble(slices: Sequence[LogicalSlice], start: int, count: int, fetch: Fetch) -> Tensor:
    """A parameter's flat range from its logical tensors."""
    return torch.cat([fetch(part, low, n) for part, low, _, n in _parts(slices, start, count)])


def wanted(slices: Sequence[LogicalSlice], kind: str, start: int, count: int) -> list[Wanted]:
    """A parameter's flat range in terms of its logical tensors."""
    return [(part.name, kind, low, n) for part, low, _, n in _parts(slices, start, count)]


def _parts(
    slices: Sequence[LogicalSlice], start: int, count: int
) -> Iterator[tuple[LogicalSlice, int, int, int]]:
    """(slice, start in it, start in the range, count) of what [start, start + count) covers."""
    for part in slices:
        low = max(part.start, start)
        high = min(part.start + part.numel, start + count)
        if low < high:
            yield part, low - part.start, low - start, high - low


@torch.no_grad()
def swap_ranges(
    have: Sequence[Piece], want: Sequence[Wanted], exchange: Exchange, group: Group, like: Tensor
) -> tuple[dict[Wanted, Tensor], int]:
    """What each wants of what all have, and the bytes of it that others sent; a collective.

    `have` names logical tensors; over the group every element that is wanted must be had once.
    Values come in the dtype and on the device of `like`, which are those of all pieces.
    """
    mine = [(name, kind, start, values.numel()) for name, kind, start, values in have]
    stories: list[tuple[list[Wanted], list[Wanted]]] = [([], [])] * group.size()
    dist.all_gather_object(stories, (mine, list(want)), group=group)
    found = {each: like.new_empty(each[3]) for each in want}
    send = [
        [
            have[index][3][low - mine[index][2] : high - mine[index][2]]
            for index, _, low, high in _overlaps(mine, their_want)
        ]
        for _, their_want in stories
    ]
    receive = [
        [
            found[want[index]][low - want[index][2] : high - want[index][2]]
            for _, index, low, high in _overlaps(their_have, want)
        ]
        for their_have, _ in stories
    ]
    assert sum(part.numel() for parts in receive for part in parts) == sum(each[3] for each in want)
    counts = [sum(part.numel() for part in parts) for parts in receive]
    arrived = exchange.swap(
        torch.cat([like.new_empty(0), *(part for parts in send for part in parts)]),
        counts,
        [sum(part.numel() for part in parts) for parts in send],
        group,
        "optimizer state",
    )
    for parts, values in zip(receive, arrived.split(counts), strict=True):
        for part, chunk in zip(parts, values.split([part.numel() for part in parts]), strict=True):
            part.copy_(chunk)
    from_others = sum(counts) - counts[group.rank()]
    return found, from_others * like.element_size()


def _overlaps(
    have: Sequence[Wanted], want: Sequence[Wanted]
) -> Iterator[tuple[int, int, int, int]]:
    """(had, wanted, low, high): indices and bounds of every common range, in order of what is
    wanted and then of what is had."""
    by_key: dict[tuple[str, str], list[int]] = {}
    for index, (name, kind, _, _) in enumerate(have):
        by_key.setdefault((name, kind), []).append(index)
    for wanted_index, (name, kind, start, count) in enumerate(want):
        for index in by_key.get((name, kind), ()):
            low = max(start, have[index][2])
            high = min(start + count, have[index][2] + have[index][3])
            if low < high:
                yield index, wanted_index, low, high
