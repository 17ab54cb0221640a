"""One step as several groups of sequences that follow each other through the pipeline.

A stage cannot begin before the stage in front of it has ended. Walked once by all sequences
together, a pipeline of P stages that each worker works at W times a step keeps it idle for
P - W of P beats: with DualPipe's two directions (W = 2) nobody on two ranks, half of the time
on four. G groups take P - W + G*W beats, of which the worker is idle for P - W: on four ranks a
third of the time with two groups, a fifth with four.

But a stage that runs few tokens takes longer for each: starting its kernels and reading its
weights takes as long as it does for many. If that is as long as the products with n tokens,
a step of N tokens takes (P - W + G*W) (n + N / G), which is least near sqrt((P - W)/W * N/n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from dualray.inference.plan import Owner, SequencePlan, StepPlan

FIXED_TOKENS = 64
"""How many tokens' products take as long as starting a stage. On one core of an AMD EPYC a layer of
the demo decodes 128 sequences in 1.48 times the time of 64, which makes 69."""


def num_groups(plan: StepPlan, replica: int, *, num_stages: int, num_walks: int) -> int:
    """Into how many groups a replica's step is split; all its workers come to the same.

    Each of them applies `num_walks` of the pipeline's `num_stages`. At least 1, and at most as
    many as the fullest owner has sequences.
    """
    mine = [sequences for owner, sequences in plan.owners.items() if owner.replica == replica]
    num_tokens = max((_num_tokens(sequences) for sequences in mine), default=0)
    most = max(map(len, mine), default=0)

    def time(count: int) -> float:
        beats = num_stages - num_walks + count * num_walks
        return beats * (FIXED_TOKENS + num_tokens / count)

    return min(range(1, most + 1), key=time, default=1)


def groups_of(plan: StepPlan, replica: int, count: int) -> list[StepPlan]:
    """The replica's part of a step as `count` steps that follow each other.

    Of every owner's sequences each has a run in their order, of nearly equally many tokens; a
    direction in which no expert rank has any is absent from a group. Because of the order a
    sequence may read what one before it writes in the same step.
    """
    parts: list[dict[Owner, tuple[SequencePlan, ...]]] = [{} for _ in range(count)]
    for owner, sequences in plan.owners.items():
        if owner.replica == replica:
            for part, run in zip(parts, _runs(sequences, count)):
                if run:
                    part[owner] = run
    return [replace(plan, owners=part) for part in parts]


def _runs(sequences: Sequence[SequencePlan], count: int) -> list[tuple[SequencePlan, ...]]:
    """A sequence belongs where the middle of its tokens lies; runs may be empty."""
    total = _num_tokens(sequences)
    ends = accumulate(len(sequence.ids) for sequence in sequences)
    runs: list[list[SequencePlan]] = [[] for _ in range(count)]
    for sequence, end in zip(sequences, ends):
        runs[(2 * end - len(sequence.ids)) * count // (2 * total)].append(sequence)
    return [tuple(run) for run in runs]


def _num_tokens(sequences: Sequence[SequencePlan]) -> int:
    return sum(len(sequence.ids) for sequence in sequences)
