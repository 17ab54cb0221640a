"""Choosing the next token from logits.

The random number of a choice is a pure function of the request's seed and the position, so
a request draws the same tokens whoever shares its batch, on any device and after any
restart. B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualray.inference.adjust import adjust
from dualray.inference.plan import Sampled, SampleSpec

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of the splitmix64 finaliser."""
    return _mix(_mix(seed & _MASK) ^ position) / (1 << 64)


def sample(logits_BV: Tensor, rows: Sequence[tuple[str, SampleSpec]]) -> list[Sampled]:
    """Chooses one token per row; `rows` are (request id, how) in the order of the logits.

    Log-probabilities and ranks are those of the logits as they are, before adjustments,
    temperature and cuts. A row with NaN comes back with a NaN log-probability, for the caller
    to fail.
    """
    if not rows:
        return []
    compute = torch.promote_types(logits_BV.dtype, torch.float32)
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1, dtype=compute)
    scores_BV = _scores(logits_BV, logprobs_BV, rows)
    chosen_B = scores_BV.argmax(dim=-1)
    drawn = [row for row, (_, spec) in enumerate(rows) if spec.temperature > 0]
    if drawn:
        chosen_B[drawn] = _draw(scores_BV[drawn], [rows[row][1] for row in drawn])

    return report(logprobs_BV, chosen_B, [(name, spec.logprobs or 0) for name, spec in rows])


def report(logprobs_BV: Tensor, tokens_B: Tensor, rows: Sequence[tuple[str, int]]) -> list[Sampled]:
    """What is told of a token per row; `rows` are (request id, alternatives to report)."""
    picked_B1 = logprobs_BV.gather(1, tokens_B[:, None])
    ranks = (logprobs_BV >= picked_B1).sum(dim=-1).tolist()
    width = max(num_top for _, num_top in rows)
    top = torch.topk(logprobs_BV, min(width, logprobs_BV.shape[1]), dim=-1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    tokens, picked = tokens_B.tolist(), picked_B1.squeeze(1).tolist()
    return [
        Sampled(
            request_id=request_id,
            token_id=tokens[row],
            logprob=picked[row],
            rank=ranks[row],
            top=tuple(zip(top_ids[row], top_values[row]))[:num_top],
        )
        for row, (request_id, num_top) in enumerate(rows)
    ]


def _scores(
    logits_BV: Tensor, logprobs_BV: Tensor, rows: Sequence[tuple[str, SampleSpec]]
) -> Tensor:
    """What tokens are chosen by: log-probabilities, or logits where a request adjusts them.

    The repetition penalty asks for a logit's sign, which log-probabilities have lost.
    """
    adjustments = [(row, spec.adjust) for row, (_, spec) in enumerate(rows) if spec.adjust]
    if not adjustments:
        return logprobs_BV
    scores_BV = logprobs_BV.clone()
    moved = [row for row, a in adjustments if a.logit_bias or a.seen_ids or a.output_counts]
    scores_BV[moved] = logits_BV[moved].to(scores_BV.dtype)
    adjust(scores_BV, adjustments)
    return scores_BV


def _draw(scores_BV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Temperature, min_p, top_k, top_p in vLLM's order, then the inverse of the cumulative sum.

    Everything in float64: 1e-5 temperatures neither overflow nor tie what was apart.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores_BV.device)[:, None]

    scores = scores_BV.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / column([s.temperature for s in specs])
    # Stable, so that equal probabilities are ordered by token id everywhere.
    probs, ids = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True, stable=True)
    V = probs.shape[1]
    place_V = torch.arange(V, device=probs.device)
    # Cut to V first: a caller's whole number may be larger than any float.
    top_k = column([min(s.top_k, V) if s.top_k > 0 else V for s in specs])
    min_p = column([s.min_p for s in specs])
    probs = probs.masked_fill((place_V >= top_k) | (probs < min_p * probs[:, :1]), 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs
    top_p = column([s.top_p for s in specs])
    # The likeliest token stays whatever rounding makes of a tiny top_p.
    probs = probs.masked_fill((before >= top_p) & (top_p < 1) & (place_V > 0), 0.0)
    cumulative = probs.cumsum(dim=-1)
    draws = column([uniform(s.seed, s.position) for s in specs]) * cumulative[:, -1:]
    at = torch.searchsorted(cumulative, draws, right=True)
    # Rounding may put a draw behind the last kept token.
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, at.clamp(max=V - 1).minimum(last.clamp(min=0))).squeeze(1)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
