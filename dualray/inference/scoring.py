"""Log-probabilities of given tokens: one causal forward, nothing sampled, nothing cached.

T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dualray.model.attention import CausalAttention
from dualray.model.context import ForwardContext
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage

TOKEN_BUDGET = 4096
"""Tokens of a forward, unless a single sequence has more."""
LOGITS_BUDGET = 1 << 25
"""Values of the logits that are in memory at once, 128 MiB in fp32."""


@torch.no_grad()
def score(
    stage: Stage,
    sequences: Sequence[Sequence[int]],
    *,
    token_budget: int = TOKEN_BUDGET,
    logits_budget: int = LOGITS_BUDGET,
    on_pack: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Natural log-probability of each token but the first, given those before it.

    `stage` holds the whole model. Sequences are independent; several share a forward of up to
    `token_budget` tokens, which bounds memory whatever the input's size. `on_pack` hears how
    many sequences are done. Softmax is computed in fp32 at least.
    """
    assert len(stage.layer_range) == stage.config.num_hidden_layers, "the whole model is needed"
    scored: list[list[float]] = []
    for pack in packs(sequences, token_budget):
        chances_T = _pack_scores(stage, pack, logits_budget).tolist()
        start = 0
        for sequence in pack:
            scored.append(chances_T[start : start + len(sequence) - 1])
            start += len(sequence)
        on_pack(len(scored))
    return scored


def packs(sequences: Sequence[Sequence[int]], token_budget: int) -> Iterator[list[Sequence[int]]]:
    """Adjacent sequences with at most `token_budget` tokens together, or a single longer one."""
    pack: list[Sequence[int]] = []
    room = token_budget
    for sequence in sequences:
        if pack and len(sequence) > room:
            yield pack
            pack, room = [], token_budget
        pack.append(sequence)
        room -= len(sequence)
    if pack:
        yield pack


def run_pack(stage: Stage, pack: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, ForwardContext]:
    """Ids (T,), normalised hidden states (T, D) and the context they came from."""
    device = next(stage.parameters()).device
    lengths = tuple(map(len, pack))
    ids_T = torch.tensor([token for sequence in pack for token in sequence], device=device)
    ctx = ForwardContext(
        positions_T=torch.cat([torch.arange(length, device=device) for length in lengths]),
        seq_lens=lengths,
        attention=CausalAttention(),
        dispatch=LocalDispatch(stage.config.n_routed_experts),
    )
    return ids_T, stage.norm(stage(stage.embed(ids_T, ctx), ctx)), ctx


def _pack_scores(stage: Stage, pack: Sequence[Sequence[int]], logits_budget: int) -> Tensor:
    """For every token of the pack the log-probability of the one after it; the last of a
    sequence has none, and its value means nothing."""
    ids_T, hidden_TD, ctx = run_pack(stage, pack)
    rows = max(1, logits_budget // stage.config.vocab_size)
    parts = []
    for hidden, targets in zip(hidden_TD.split(rows), ids_T.roll(-1).split(rows)):
        logits = stage.head(hidden, ctx)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(1, targets[:, None]).squeeze(1)
        parts.append(chosen - logits.logsumexp(-1))
    return torch.cat(parts)
