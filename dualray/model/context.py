"""What a forward is told about the world: `ForwardContext`.

Training, prefill and decode run the same modules and differ only in this object, so there
is no second model for inference. Shape letters: T tokens, D model, H heads, K top-k,
E experts, C latent, R rotary width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dualray.model.recompute import Recompute


class WeightGradSink(Protocol):
    """Takes weight-gradient work out of a backward, to run at once or later."""

    def submit(self, weight: Tensor, accumulate: Callable[[Tensor], None]) -> None:
        """`accumulate(main_grad)` adds this use's gradient into fp32 `weight.main_grad`.

        It must run with gradients disabled: it still holds tensors of the graph.
        """
        ...


class AttentionQuery(Protocol):
    """What one layer hands to the attention backend, whichever kind of attention it has.

    H query heads share G key/value heads. Training expands keys and values; serving stores
    `cache_rows` and attends over such rows, which Multi-head Latent Attention does without
    expanding them: its one cached row is the key and the value of all heads.
    """

    @property
    def layer(self) -> int: ...
    @property
    def softmax_scale(self) -> float: ...
    def cache_rows(self) -> Tensor:
        """What is remembered of each token, `ModelConfig.cache_dim` wide."""
        ...

    def expand(self, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, d), keys (T, G, d) and values (T, G, v)."""
        ...

    def cache_queries(self) -> Tensor:
        """Queries (T, H, k) that score the keys of cached rows."""
        ...

    def cache_keys(self, rows_L: Tensor) -> Tensor:
        """Keys (..., G, k) of cached rows (..., L); a view."""
        ...

    def cache_values(self, rows_L: Tensor) -> Tensor:
        """Values (..., G, c) of cached rows (..., L); a view."""
        ...

    def cache_output(self, out_THc: Tensor) -> Tensor:
        """Weighted sums of cached values to the heads' outputs (T, H, v)."""
        ...


class AttentionBackend(Protocol):
    """Attends; returns (T, H, v_head_dim)."""

    def attend(self, query: AttentionQuery, ctx: ForwardContext) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A token's chosen experts and gate values, with the scores they came from.

    experts_TK int64 (logical experts), gates_TK and scores_TE in the router's dtype.
    """

    experts_TK: Tensor
    gates_TK: Tensor
    scores_TE: Tensor
    row_multiple: int | None = None
    """What every expert's rows are padded to a multiple of; None for what is fastest."""


class ExpertDispatch(Protocol):
    """Carries tokens to the experts' owners and back.

    `dispatch` returns rows ordered by local expert slot with int32 end offsets per slot, or
    the number of rows of each where all have as many;
    `combine` takes rows in that same order and returns the gate-weighted sum per token.
    """

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor: ...


@dataclass(kw_only=True)
class Dispatched:
    """Rows on their expert's worker. `state` is the dispatcher's own way back."""

    rows_ND: Tensor
    offsets: Tensor | int
    state: Any


@dataclass
class RoutingTape:
    """Records every layer's expert choice, or replays a recorded one.

    Routing near-ties flip between implementations of equal mathematics; comparing two of
    them needs the same choice. `choices[layer]` is (T, K) int64.
    """

    choices: dict[int, Tensor] = field(default_factory=dict)
    replay: bool = False


@dataclass(kw_only=True)
class ForwardContext:
    """Everything a forward needs besides weights and input.

    `positions_T` int64 are rotary positions. `seq_lens` are the lengths of the sequences
    packed into T, in order. `weight_grads=None` leaves gradients to plain autograd, which
    is the slow twin of the deferred path. `balance_scale` multiplies the sequence-wise
    balance loss (alpha over the global number of sequences); 0 skips it. `aux_scale` does so for
    the auxiliary loss over all T tokens (its weight over the global number of micro-batches).
    `loads` collects int64 tokens per logical expert by layer; None when nobody asks. `recompute`
    takes RMSNorms and MLA's up-projections that the backward makes again; None keeps them.
    """

    positions_T: Tensor
    seq_lens: tuple[int, ...]
    attention: AttentionBackend
    dispatch: ExpertDispatch
    weight_grads: WeightGradSink | None = None
    balance_scale: float = 0.0
    aux_scale: float = 0.0
    loads: dict[int, Tensor] | None = None
    tape: RoutingTape | None = None
    recompute: Recompute | None = None
    cos_sin: tuple[Tensor, Tensor] | None = None
    """Rotary angles of `positions_T`; the stage fills them in once for all its layers."""
    balance_losses: list[Tensor] = field(default_factory=list)

    def balance_loss(self) -> Tensor | None:
        """Sum of the balance losses that this forward's MoE layers added; None if none did."""
        if not self.balance_losses:
            return None
        return torch.stack(self.balance_losses).sum()
