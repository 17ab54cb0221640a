"""Tensors that a forward forgets and its backward makes again.

DeepSeek-V3 recomputes RMSNorms and MLA's up-projections (arXiv 2412.19437, section 3.2.3): wide
results of cheap operations on narrow or already kept inputs. Whoever computes such a tensor says
how to make it again; a layer that would save it for its backward, under whatever view, saves the
recipe. The same kernels run on the same inputs, so gradients are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Make = Callable[[], tuple[Tensor, ...]]


class Again:
    """Results of one computation, made when they are asked for and kept while more will be."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._made: tuple[Tensor, ...] | None = None
        self._saved = 0

    def save(self) -> None:
        """Somebody will `take` a result in the backward."""
        self._saved += 1

    def take(self, index: int) -> Tensor:
        """A result for one who has saved it."""
        result = self.look(index)
        self._saved -= 1
        if not self._saved:
            self._made = None
        return result

    def look(self, index: int = 0) -> Tensor:
        """A result for another computation that is made again."""
        if self._made is not None:
            return self._made[index]
        with torch.no_grad():
            made = self._make()
        if self._saved:
            self._made = made
        return made[index]


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """A view of a result."""

    again: Again
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recompute:
    """What one micro-batch's forward forgets, block by block."""

    def __init__(self) -> None:
        self._forgotten: dict[int, tuple[Again, int, Tensor]] = {}

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Within it, saving a forgotten tensor saves its recipe. It does not nest."""
        assert not self._forgotten
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            try:
                yield
            finally:
                self._forgotten.clear()

    def forget(self, make: Make, *tensors: Tensor) -> Again:
        """`make` gives `tensors` again, laid out alike, from what is kept anyway."""
        again = Again(make)
        for index, tensor in enumerate(tensors):
            # Held until the scope ends: their addresses must not become another tensor's.
            self._forgotten[tensor.untyped_storage().data_ptr()] = (again, index, tensor)
        return again

    def _pack(self, tensor: Tensor) -> Tensor | _Recipe:
        if not tensor.numel():
            return tensor
        known = self._forgotten.get(tensor.untyped_storage().data_ptr())
        if known is None or known[2].dtype != tensor.dtype:
            return tensor
        again, index, _ = known
        again.save()
        return _Recipe(
            again=again,
            index=index,
            size=tensor.size(),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
        )


def _unpack(saved: Tensor | _Recipe) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.again.take(saved.index).as_strided(saved.size, saved.stride, saved.offset)
