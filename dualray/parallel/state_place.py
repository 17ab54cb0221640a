"""Where optimizer state is while its workers do something else than train.

Tensors stay the objects that they are, since DeepSpeed and torch's AdamW have hold of them; only
the memory under them goes and comes back. So an optimizer goes on bit-exactly with what was parked.

Parking is for workers with a device. What is in host memory already stays where it is: a copy
beside it would gain nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class StatePlace(StrEnum):
    """What becomes of optimizer state while a run serves."""

    KEEP = "keep"
    """It stays where it is."""
    PARK = "park"
    """It goes to host memory and comes back from there."""
    DROP = "drop"
    """It is forgotten; training goes on from a checkpoint of the same step."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one worker's optimizer state, masters and moments, by where they are."""

    kept: int = 0
    """In the memory that training uses."""
    parked: int = 0
    """In host memory; on a worker without a device that is where they always are."""
    dropped: int = 0
    """Nowhere."""
    gradients_freed: int = 0
    """Bytes of gradient buffers that were given back, too: between steps they are zero."""

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            kept=self.kept + other.kept,
            parked=self.parked + other.parked,
            dropped=self.dropped + other.dropped,
            gradients_freed=self.gradients_freed + other.gradients_freed,
        )


class Shelf:
    """The memory of one optimizer's tensors, put away until `bring_back`."""

    def __init__(
        self,
        place: StatePlace,
        state: Iterable[Tensor],
        gradients: Iterable[Tensor],
        *,
        leave_host: bool = True,
    ) -> None:
        """`state` are tensors with a memory of their own each; `gradients` are zero now, and may be
        views of one buffer. Without `leave_host` state in host memory is copied and freed like any
        other, so that parking can be tested without a device."""
        self._state: list[tuple[Tensor, torch.Size, Tensor | None]] = []
        self._buffers: list[tuple[torch.UntypedStorage, int]] = []
        tensors = list(state)
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        if place is StatePlace.KEEP:
            self.size = StateBytes(kept=num_bytes)
            return
        parks = place is StatePlace.PARK
        for tensor in tensors:
            if parks and leave_host and tensor.device.type == "cpu":
                continue
            copy = tensor.detach().to("cpu", copy=True) if parks else None
            self._state.append((tensor, tensor.shape, copy))
            tensor.data = tensor.detach().new_empty(0)
        for storage in _storages(gradients):
            self._buffers.append((storage, storage.nbytes()))
            # Views of it in other hands, DeepSpeed's for one, must not hold the memory.
            storage.resize_(0)
        self.size = StateBytes(
            parked=num_bytes if parks else 0,
            dropped=0 if parks else num_bytes,
            gradients_freed=sum(size for _, size in self._buffers),
        )

    def bring_back(self) -> None:
        """Give the memory back: with what was parked, zeros where nothing was."""
        for tensor, shape, copy in self._state:
            fresh = tensor.detach().new_zeros(shape)
            if copy is not None:
                fresh.copy_(copy)
            tensor.data = fresh
        for storage, num_bytes in self._buffers:
            storage.resize_(num_bytes)
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        self._state.clear()
        self._buffers.clear()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The memory under the tensors, each piece once."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())
