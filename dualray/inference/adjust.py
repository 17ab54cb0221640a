"""Bias, penalties and bans on the logits of the requests that ask for them.

The order is vLLM's: logit_bias, then the repetition penalty, then frequency and presence, all
before temperature and cuts. Only the named tokens' logits are touched, so that the work
grows with what a request has said and not with the vocabulary. B rows, V vocabulary, N
touched logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dualray.inference.plan import Adjustment


def adjust(logits_BV: Tensor, adjustments: Sequence[tuple[int, Adjustment]]) -> None:
    """Changes, in place, the rows named by `adjustments` (row, how). Float32 or float64.

    A row's new values depend on that row alone. Finite logits stay finite, but for banned
    tokens, which become -inf.
    """
    limit = torch.finfo(logits_BV.dtype).max
    bias = [(row, i, bias) for row, a in adjustments for i, bias in a.logit_bias]
    if bias:
        at, bias_N = _cells(logits_BV, bias)
        logits_BV[at] += bias_N
    seen = [(row, i, a.repetition_penalty) for row, a in adjustments for i in a.seen_ids]
    if seen:
        at, penalty_N = _cells(logits_BV, seen)
        old_N = logits_BV[at]
        # A tiny penalty would carry a logit beyond the largest number, and inf - inf is NaN.
        new_N = torch.where(old_N > 0, (old_N / penalty_N).clamp(max=limit), old_N * penalty_N)
        logits_BV[at] = new_N
    counts = [
        (row, i, a.frequency_penalty * count, a.presence_penalty)
        for row, a in adjustments
        for i, count in a.output_counts
    ]
    if counts:
        at, frequency_N = _cells(logits_BV, [(row, i, x) for row, i, x, _ in counts])
        _, presence_N = _cells(logits_BV, [(row, i, x) for row, i, _, x in counts])
        logits_BV[at] = logits_BV[at] - frequency_N - presence_N
    banned = [(row, i, 0.0) for row, a in adjustments for i in a.banned_ids]
    if banned:
        logits_BV[_cells(logits_BV, banned)[0]] = float("-inf")


def _cells(
    logits_BV: Tensor, entries: Iterable[tuple[int, int, float]]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where (row, token id) point, as an index, and the N values that belong there."""
    rows, ids, values = zip(*entries)
    device = logits_BV.device
    index = (torch.tensor(rows, device=device), torch.tensor(ids, device=device))
    return index, torch.tensor(values, dtype=logits_BV.dtype, device=device)
