"""Bias, penalties, bans and grammars on the logits of the requests that ask for them.

The order is vLLM's: logit_bias, then the repetition penalty, then frequency and presence, all
before temperature and cuts. Only the named tokens' logits are touched, so that the work
grows with what a request has said and not with the vocabulary, but for grammars. B rows, V
vocabulary, A adjusted rows, N touched logits over all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualray.inference.plan import Adjustment


def adjust(logits_BV: Tensor, adjustments: Sequence[tuple[int, Adjustment]]) -> None:
    """Changes, in place, the rows named by `adjustments` (row, how). Float32 or float64.

    A row's new values depend on that row alone. Finite logits stay finite, but for tokens that
    are banned or not allowed, which become -inf.
    """
    rows_A, how_A = zip(*adjustments)
    said = _Said()
    cells = _Cells(logits_BV, rows_A, [_ids([i for i, _ in a.logit_bias]) for a in how_A])
    if cells:
        bias_N = cells.values([bias for a in how_A for _, bias in a.logit_bias])
        logits_BV[cells.at] += bias_N

    cells = _Cells(logits_BV, rows_A, [said.seen_ids(a) for a in how_A])
    if cells:
        penalty_N = cells.of_rows([a.repetition_penalty for a in how_A])
        old_N = logits_BV[cells.at]
        # A tiny penalty would carry a logit beyond the largest number, and inf - inf is NaN.
        divided_N = (old_N / penalty_N).clamp(max=torch.finfo(logits_BV.dtype).max)
        logits_BV[cells.at] = torch.where(old_N > 0, divided_N, old_N * penalty_N)

    pairs_A = [said.output_counts(a) for a in how_A]
    cells = _Cells(logits_BV, rows_A, [pairs[:, 0] for pairs in pairs_A])
    if cells:
        count_N = cells.values(np.concatenate([pairs[:, 1] for pairs in pairs_A]))
        frequency_N = cells.of_rows([a.frequency_penalty for a in how_A])
        presence_N = cells.of_rows([a.presence_penalty for a in how_A])
        logits_BV[cells.at] = logits_BV[cells.at] - frequency_N * count_N - presence_N

    # Bans of the whole vocabulary would leave no number; its last ones are bad words'.
    most = logits_BV.shape[1] - 1
    cells = _Cells(logits_BV, rows_A, [_ids(a.banned_ids[:most]) for a in how_A])
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


def _ids(ids: Sequence[int]) -> NDArray[np.int64]:
    # Numpy reads a long list of Python's numbers five times as fast as torch.
    return np.fromiter(ids, np.int64, len(ids))


class _Said:
    """What is behind adjusted rows, drafts included, as arrays.

    The rows of one sequence share all but their drafts, and what they share is read once.
    """

    def __init__(self) -> None:
        self._seen: dict[int, NDArray[np.int64]] = {}
        self._counts: dict[int, NDArray[np.int64]] = {}

    def seen_ids(self, how: Adjustment) -> NDArray[np.int64]:
        """Ids, none twice."""
        key = id(how.seen_ids)
        if key not in self._seen:
            self._seen[key] = _ids(how.seen_ids)
        ids = self._seen[key]
        if how.repetition_penalty == 1:
            return ids
        new = [draft for draft in dict.fromkeys(how.draft_ids) if not (ids == draft).any()]
        return np.concatenate([ids, _ids(new)]) if new else ids

    def output_counts(self, how: Adjustment) -> NDArray[np.int64]:
        """Rows of an id and how often it was chosen; no id twice."""
        key = id(how.output_counts)
        if key not in self._counts:
            self._counts[key] = _pairs(how.output_counts)
        pairs = self._counts[key]
        if not how.draft_ids or not (how.frequency_penalty or how.presence_penalty):
            return pairs
        pairs, new = pairs.copy(), []
        for draft, count in Counter(how.draft_ids).items():
            same = pairs[:, 0] == draft
            if same.any():
                pairs[same, 1] += count
            else:
                new.append((draft, count))
        return np.concatenate([pairs, _pairs(new)]) if new else pairs


def _pairs(pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    flat = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs))
    return flat.reshape(-1, 2)


class _Cells:
    """N logits as an index: the token ids of each adjusted row, one row after the other."""

    def __init__(
        self, logits_BV: Tensor, rows_A: Sequence[int], ids_A: Sequence[NDArray[np.int64]]
    ) -> None:
        self._like = logits_BV
        self._counts = [len(ids) for ids in ids_A]
        self._num = sum(self._counts)
        if self._num:
            ids_N = torch.from_numpy(np.concatenate(ids_A))
            self.at = (self._repeated(torch.tensor(rows_A)), ids_N.to(logits_BV.device))

    def __len__(self) -> int:
        return self._num

    def values(self, values_N: Sequence[float] | NDArray[np.int64]) -> Tensor:
        """A number for each logit, in the order of the index."""
        return torch.as_tensor(values_N, dtype=self._like.dtype, device=self._like.device)

    def of_rows(self, values_A: Sequence[float]) -> Tensor:
        """A number for each row, repeated for its logits."""
        return self._repeated(torch.tensor(values_A, dtype=self._like.dtype))

    def _repeated(self, values_A: Tensor) -> Tensor:
        repeats_A = torch.tensor(self._counts)
        return values_A.repeat_interleave(repeats_A).to(self._like.device)
