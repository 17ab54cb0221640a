"""Log-probabilities of a prompt's own tokens, as serving reports them.

Prompts run in parts beside other requests, and each part is scored where its last hidden states
are, some rows at a time: the logits of a whole prompt would not fit. T rows of a step, N scored
ones, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dualray.inference.plan import PromptScored, Sampled, SequencePlan
from dualray.inference.sampler import report


def score_prompts(
    head: Callable[[Tensor], Tensor],
    normed_TD: Tensor,
    sequences: Sequence[SequencePlan],
    *,
    rows_at_once: int,
) -> list[PromptScored]:
    """Scores the prompt tokens that the sequences ask for; `head` makes logits of rows.

    `normed_TD` are the last stage's normalised outputs of all T rows, or more. Softmax is computed
    in fp32 at least.
    """
    rows: list[int] = []
    targets: list[int] = []
    asked: list[tuple[str, int]] = []
    start = 0
    for sequence in sequences:
        if sequence.prompt is not None:
            count = len(sequence.prompt.targets)
            rows += range(start, start + count)
            targets += sequence.prompt.targets
            asked += [(sequence.request_id, sequence.prompt.logprobs)] * count
        start += len(sequence.ids)
    if not rows:
        return []
    told: list[Sampled] = []
    for first in range(0, len(rows), rows_at_once):
        part = slice(first, first + rows_at_once)
        logits_NV = head(normed_TD[rows[part]])
        compute = torch.promote_types(logits_NV.dtype, torch.float32)
        logprobs_NV = torch.log_softmax(logits_NV, dim=-1, dtype=compute)
        targets_N = torch.tensor(targets[part], device=logits_NV.device)
        told += report(logprobs_NV, targets_N, asked[part])
    return _by_sequence(told, sequences)


def _by_sequence(told: list[Sampled], sequences: Sequence[SequencePlan]) -> list[PromptScored]:
    scored = []
    start = 0
    for sequence in sequences:
        if sequence.prompt is None:
            continue
        stop = start + len(sequence.prompt.targets)
        scored.append(
            PromptScored(
                request_id=sequence.request_id,
                first_position=sequence.first_position + 1,
                tokens=tuple(told[start:stop]),
            )
        )
        start = stop
    return scored
