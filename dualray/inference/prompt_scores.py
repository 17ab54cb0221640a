"""Log-probabilities of a prompt's own tokens, as serving reports them.

Prompts run in parts beside other requests, and each part is scored where its last hidden states
are, some rows at a time: the logits of a whole prompt would not fit. T rows of a step, N scored
ones, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualray.inference.plan import PromptScored, Sampled, SequencePlan
from dualray.inference.sampler import report
from dualray.inference.scoring import LOGITS_BUDGET
from dualray.model.context import ForwardContext
from dualray.model.stage import Stage


def score_prompts(
    stage: Stage,
    hidden_TD: Tensor,
    ctx: ForwardContext,
    sequences: Sequence[SequencePlan],
    *,
    logits_budget: int = LOGITS_BUDGET,
) -> list[PromptScored]:
    """Scores the prompt tokens that the sequences ask for; `stage` is the last one.

    `hidden_TD` are its layers' outputs of all T rows. Softmax is computed in fp32 at least, over
    `logits_budget` values at once.
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
    size = max(1, logits_budget // stage.config.vocab_size)
    told: list[Sampled] = []
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        logits_NV = stage.logits(hidden_TD[rows[part]], ctx)
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
