"""The same bits for a request, whatever runs beside it (`serve.batch_invariant`).

How a matrix product rounds depends on how many rows share it: of 1 to 15 rows each may get other
bits than of 16. So a request's log-probabilities would depend, in their last bits, on its
companions, on how its prompt was cut into parts, on what the prefix cache had of it and on
whether it was preempted. Here a row's way through a stage depends on the row and on the cached
rows before it alone:

- Rows of a step, of an expert and of the head are padded to a multiple of 16, from where on a
  product gives each row the same bits, and elementwise kernels have no odd end.
- Every row attends on its own, over as many cached rows as its position says, also in a prompt,
  with a copy of its query: products round by the alignment of memory, too.
- Every token is chosen on its own.

Measured with torch 2.13 on a Zen 4 CPU, 1 and 2 threads, fp32 and bf16, with widths from 8 to
30000: linear layers, batched products and experts gave each row the same bits for every multiple
of 16 up to 512, and fp32 ones other bits below. Norms, softmax, sums, top-k and gated sums gave
the same bits for every count. The bits still depend on the number of threads. What it costs: 16
requests of 256 + 32 tokens ran at 0.84 (fp32) and 0.68 (bf16) times the tokens per second of CPU
time, one at 0.67 and 0.73, prompts of 1000 tokens at 0.86 to 1 (4 layers, 256 wide, 16 experts,
one thread).

T rows of a step, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dualray.errors import ConfigError
from dualray.inference.plan import SequencePlan
from dualray.model.context import Dispatched, ExpertDispatch, Routing

ROWS = 16
"""Rows are padded to a multiple of this."""


def check_device(device: torch.device) -> None:
    """Raises ConfigError where the mode would promise what nobody has measured."""
    if device.type != "cpu":
        raise ConfigError(
            f"serve.batch_invariant is true and the workers compute on {device.type}, where "
            "products of other numbers of rows come from other kernels",
            hint="leave serve.batch_invariant out, or serve on CPUs",
        )


def pad_rows(x_ND: Tensor) -> Tensor:
    """Zero rows behind the last one, up to a multiple of `ROWS`; no row stays none."""
    return F.pad(x_ND, (0, 0, 0, -len(x_ND) % ROWS))


def one_row_each(sequences: Sequence[SequencePlan], padding_block: int) -> list[SequencePlan]:
    """A sequence for each row, and for padding rows, which live in a block of their own.

    A layer writes all its rows to the cache before any of them attends.
    """
    rows = [
        replace(plan, ids=(token,), first_position=plan.first_position + i, samples=())
        for plan in sequences
        for i, token in enumerate(plan.ids)
    ]
    padding = SequencePlan(
        request_id="", ids=(0,), first_position=0, block_table=(padding_block,), samples=()
    )
    return rows + [padding] * (-len(rows) % ROWS)


class RealRowsDispatch:
    """`ExpertDispatch` that leaves padding rows out, and pads each expert's rows instead.

    Experts neither compute nor count what nobody asked for.
    """

    def __init__(self, inner: ExpertDispatch, num_rows: int) -> None:
        self._inner = inner
        self._num_rows = num_rows

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatched:
        real = slice(self._num_rows)
        routing = replace(
            routing,
            experts_TK=routing.experts_TK[real],
            gates_TK=routing.gates_TK[real],
            scores_TE=routing.scores_TE[real],
            row_multiple=ROWS,
        )
        return self._inner.dispatch(layer, x_TD[real], routing)

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        return pad_rows(self._inner.combine(y_ND, dispatched))
