"""How long workers of a deep pipeline idle in a serving step, split into groups or not.

A worker of DualPipe's four ranks needs a core of its own to show that in wall time. So every
stage is run here by itself, over decoding and over prompts, as one group's and as several
groups' sequences, and the measured times are put into the pipeline's order by the simulator that
draws schedules.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dualray.inference.plan import Owner, SampleSpec, SequencePlan, StepPlan
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_groups import groups_of, num_groups
from dualray.model.config import ModelConfig
from dualray.model.init import initialise
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage
from dualray.schedule.forward_only import forward_only
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Costs, simulate

_BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class IdleCase:
    """What each direction of the pipeline runs in a step."""

    words: str
    num_ranks: int
    num_sequences: int
    num_new: int
    """Tokens of each sequence that the step runs."""
    context: int
    """Tokens before them."""


def idle_shares(
    config: ModelConfig, cases: Sequence[IdleCase], *, repeats: int
) -> list[dict[str, Any]]:
    """For each case one group, and as many as the engine would choose. On one torch thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_idle_share(config, case, repeats) for case in cases]
    finally:
        torch.set_num_threads(threads)


def _idle_share(config: ModelConfig, case: IdleCase, repeats: int) -> dict[str, Any]:
    schedule = make_schedule("dualpipe", case.num_ranks, 2 * case.num_ranks)
    owner = Owner(replica=0, expert=0, direction=0)
    plan = StepPlan(step=1, owners={owner: _sequences(case, config.vocab_size)})
    chosen = num_groups(plan, 0, num_stages=schedule.num_stages, num_walks=2)
    stages = _stages(config, schedule.num_stages, case)
    found = {}
    for count in dict.fromkeys((1, chosen)):
        groups = [group.sequences(owner) for group in groups_of(plan, 0, count)]
        seconds = [_stage_seconds(stage, groups, repeats) for stage in stages]
        # All groups of a stage are as large as each other, but for a token or a sequence.
        costs = [Costs(forward=one) for one in seconds]
        timeline = simulate(forward_only(schedule, 2 * count), costs)
        found[count] = {
            "groups": count,
            "idle": timeline.bubble,
            "step_ms": timeline.makespan * 1e3,
            "stage_ms": statistics.mean(seconds) * 1e3,
        }
    return {
        "part": "idle",
        "case": case.words,
        "how": "simulated from measured stages",
        "num_ranks": case.num_ranks,
        "num_sequences": case.num_sequences,
        "num_tokens": case.num_sequences * case.num_new,
        "one_group": found[1],
        "chosen": found[chosen],
    }


def _stages(config: ModelConfig, num_stages: int, case: IdleCase) -> list[StageRunner]:
    per_stage = config.num_hidden_layers // num_stages
    blocks = -(-(case.context + case.num_new) // _BLOCK_SIZE) * case.num_sequences
    runners = []
    for number in range(num_stages):
        stage = Stage(config, range(number * per_stage, (number + 1) * per_stage))
        initialise(stage, 0)
        runners.append(
            StageRunner(
                stage,
                LocalDispatch(config.n_routed_experts),
                num_blocks=blocks,
                block_size=_BLOCK_SIZE,
            )
        )
    return runners


def _stage_seconds(
    stage: StageRunner, groups: Sequence[Sequence[SequencePlan]], repeats: int
) -> float:
    """Median over the groups and `repeats` rounds, after one that is not counted."""
    seconds = []
    for number in range(repeats + 1):
        for sequences in groups:
            tokens = sum(len(sequence.ids) for sequence in sequences)
            shape = (tokens, stage.stage.config.hidden_size)
            # Different rows, which choose different experts.
            hidden_TD = None if stage.stage.is_first else torch.randn(shape)
            # Processor time: whatever else runs on the machine does not count.
            started = time.thread_time()
            stage.run(sequences, hidden_TD)
            if number:
                seconds.append(time.thread_time() - started)
    return statistics.median(seconds)


def _sequences(case: IdleCase, vocab_size: int) -> tuple[SequencePlan, ...]:
    length = case.context + case.num_new
    blocks = -(-length // _BLOCK_SIZE)
    greedy = SampleSpec(
        position=length, seed=0, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, logprobs=None
    )
    rng = random.Random(0)
    return tuple(
        SequencePlan(
            request_id=str(number),
            ids=tuple(rng.randrange(vocab_size) for _ in range(case.num_new)),
            first_position=case.context,
            block_table=tuple(range(number * blocks, (number + 1) * blocks)),
            samples=(greedy,),
        )
        for number in range(case.num_sequences)
    )
