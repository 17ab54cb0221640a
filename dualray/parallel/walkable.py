"""What a walk of a schedule asks of the stages it walks.

`HeldStages` of the model's `Stage` answers it; a benchmark's stand-in may too, and then the same
executor walks the same schedule over something that takes a known time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from dualray.model.context import ForwardContext
from dualray.model.stage import Losses


class WalkableStage(Protocol):
    """A stage; see `dualray.model.stage.Stage` for shapes."""

    def embed(self, ids_T: Tensor, ctx: ForwardContext) -> Tensor: ...

    def __call__(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor: ...

    def losses(
        self, hidden_TD: Tensor, labels_DT: Tensor, ctx: ForwardContext, *, with_mtp: bool = True
    ) -> Losses: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Walkable(Protocol):
    """The stages of one worker by number, and the width of what travels between them."""

    @property
    def stages(self) -> Mapping[int, WalkableStage]: ...

    @property
    def hidden_size(self) -> int: ...
