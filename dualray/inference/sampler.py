"""Choosing the next token from logits.

The random numbers of a choice are a pure function of the request's seed and the position, so
a request draws the same tokens whoever shares its batch, on any device and after any
restart. A token is drawn by a race: each token's clock is exponential with its probability as
the rate, and the first to ring has won, which it does with that probability (the Gumbel-max
trick, arXiv 1411.0030, without two of its logarithms). Two distributions that race with the
same noise mostly agree, and the closer they are the more, which is what drafts live on
(`speculative`). B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualray.inference.adjust import adjust
from dualray.inference.noise import exponentials
from dualray.inference.plan import Sampled, SampleSpec


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
    chosen_B = choose(logits_BV, [spec for _, spec in rows])
    return report(logprobs_BV, chosen_B, [(name, spec.logprobs or 0) for name, spec in rows])


def choose(logits_BV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Token ids (B,) int64: the likeliest at temperature 0, else drawn.

    A valid id comes out of any row, NaN or not.
    """
    scores_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    adjustments = [(row, spec.adjust) for row, spec in enumerate(specs) if spec.adjust]
    if adjustments:
        scores_BV = scores_BV.clone()
        adjust(scores_BV, adjustments)
    drawn = [row for row, spec in enumerate(specs) if spec.temperature > 0]
    if len(drawn) == len(specs):
        return _draw(scores_BV, specs)
    chosen_B = scores_BV.argmax(dim=-1)
    if drawn:
        chosen_B[drawn] = _draw(scores_BV[drawn], [specs[row] for row in drawn])
    return chosen_B


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


def _draw(scores_BV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Temperature, min_p, top_k, top_p in vLLM's order, then the race among what is left.

    Everything in float64: 1e-5 temperatures neither overflow nor tie what was apart.
    """
    scores_BV = scores_BV.double()
    scores_BV = scores_BV - scores_BV.amax(dim=-1, keepdim=True)
    temperatures_B1 = _column([s.temperature for s in specs], scores_BV)
    weights_BV = scores_BV.div_(temperatures_B1).exp_()  # the likeliest token's is 1
    V = weights_BV.shape[1]
    if any(s.min_p > 0 for s in specs):
        weights_BV.masked_fill_(weights_BV < _column([s.min_p for s in specs], weights_BV), 0.0)
    cut = [row for row, s in enumerate(specs) if 0 < s.top_k < V or s.top_p < 1]
    if cut:
        weights_BV[cut] = _cut(weights_BV[cut], [specs[row] for row in cut])
    clocks_BV = exponentials([(s.seed, s.position) for s in specs], V, weights_BV.device)
    return weights_BV.div_(clocks_BV).argmax(dim=-1)


def _cut(weights_BV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """`weights_BV` with zeros where top_k and top_p leave a token out."""
    # Stable, so that equal probabilities are ordered by token id everywhere.
    sorted_BV, ids_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    V = weights_BV.shape[1]
    place_V = torch.arange(V, device=weights_BV.device)
    # Cut to V first: a caller's whole number may be larger than any float.
    top_k = _column([min(s.top_k, V) if s.top_k > 0 else V for s in specs], weights_BV)
    sorted_BV = sorted_BV.masked_fill(place_V >= top_k, 0.0)
    probs_BV = sorted_BV / sorted_BV.sum(dim=-1, keepdim=True)
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    top_p = _column([s.top_p for s in specs], weights_BV)
    # The likeliest token stays whatever rounding makes of a tiny top_p.
    sorted_BV.masked_fill_((before_BV >= top_p) & (top_p < 1) & (place_V > 0), 0.0)
    return torch.empty_like(sorted_BV).scatter_(1, ids_BV, sorted_BV)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
