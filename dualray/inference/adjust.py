"""Bias, penalties, bans and grammars on the logits of the requests that ask for them.

The order is vLLM's: logit_bias, then the repetition penalty, then frequency and presence, all
before temperature and cuts. Only the named tokens' logits are touched, so that the work
grows with what a request has said and not with the vocabulary, but for grammars. B rows, V
vocabulary, A adjusted rows, N touched logits over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dualray.inference.plan import Adjustment


def adjust(logits_BV: Tensor, adjustments: Sequence[tuple[int, Adjustment]]) -> None:
    """Changes, in place, the rows named by `adjustments` (row, how). Float32 or float64.

    A row's new values depend on that row alone. Finite logits stay finite, but for tokens that
    are banned or not allowed, which become -inf.
    """
    rows_A, how_A = zip(*adjustments)
    cells = _Cells(logits_BV, rows_A, [[i for i, _ in a.logit_bias] for a in how_A])
    if cells:
        bias_N = cells.values([bias for a in how_A for _, bias in a.logit_bias])
        logits_BV[cells.at] += bias_N

    cells = _Cells(logits_BV, rows_A, [a.seen_ids for a in how_A])
    if cells:
        penalty_N = cells.of_rows([a.repetition_penalty for a in how_A])
        old_N = logits_BV[cells.at]
        # A tiny penalty would carry a logit beyond the largest number, and inf - inf is NaN.
        divided_N = (old_N / penalty_N).clamp(max=torch.finfo(logits_BV.dtype).max)
        logits_BV[cells.at] = torch.where(old_N > 0, divided_N, old_N * penalty_N)

    cells = _Cells(logits_BV, rows_A, [[i for i, _ in a.output_counts] for a in how_A])
    if cells:
        count_N = cells.values([count for a in how_A for _, count in a.output_counts])
        frequency_N = cells.of_rows([a.frequency_penalty for a in how_A])
        presence_N = cells.of_rows([a.presence_penalty for a in how_A])
        logits_BV[cells.at] = logits_BV[cells.at] - frequency_N * count_N - presence_N

    cells = _Cells(logits_BV, rows_A, [a.banned_ids for a in how_A])
    if cells:
        logits_BV[cells.at] = float("-inf")

    for row, how in adjustments:
        if how.allowed:
            logits_BV[row].masked_fill_(_outside(how.allowed, logits_BV), float("-inf"))


def _outside(allowed: bytes, logits_BV: Tensor) -> Tensor:
    """Bool (V): the tokens that are not in a packed set."""
    V = logits_BV.shape[1]
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), count=V, bitorder="little")
    return torch.from_numpy(bits == 0).to(logits_BV.device)


class _Cells:
    """N logits as an index: the token ids of each adjusted row, one row after the other."""

    def __init__(
        self, logits_BV: Tensor, rows_A: Sequence[int], ids_A: Sequence[Sequence[int]]
    ) -> None:
        self._like = logits_BV
        self._counts = [len(ids) for ids in ids_A]
        self._num = sum(self._counts)
        if self._num:
            # Numpy reads a long list of Python's numbers five times as fast as torch.
            ids_N = torch.from_numpy(np.fromiter(chain.from_iterable(ids_A), np.int64, self._num))
            self.at = (self._repeated(torch.tensor(rows_A)), ids_N.to(logits_BV.device))

    def __len__(self) -> int:
        return self._num

    def values(self, values_N: Sequence[float]) -> Tensor:
        """A number for each logit, in the order of the index."""
        return torch.tensor(values_N, dtype=self._like.dtype, device=self._like.device)

    def of_rows(self, values_A: Sequence[float]) -> Tensor:
        """A number for each row, repeated for its logits."""
        return self._repeated(torch.tensor(values_A, dtype=self._like.dtype))

    def _repeated(self, values_A: Tensor) -> Tensor:
        repeats_A = torch.tensor(self._counts)
        return values_A.repeat_interleave(repeats_A).to(self._like.device)
