"""Drafts over pipeline and expert ranks: workers say what they say without.

Expert ranks walk the MTP modules together although each has other sequences, or none, and the
groups of a step do so one after the other. Drafts are the modules' own, which hardly ever come
true, or what will be said, which always does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer

from dualray.inference.limits import Limits
from dualray.inference.plan import Sampled
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import PipelineTransport, StepRunner
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig

LIMITS = Limits(num_blocks=24, block_size=4, max_batch=4, max_context=32, max_step_tokens=8)
PROMPTS = {
    "a": (5, 17, 3, 60, 8, 9, 11, 2),
    "b": (1, 2, 3),
    "c": (90,),
    "d": (4, 4, 8, 15, 16, 23),
    "e": (31, 7),
}
MANY = {f"{i}": tuple((7 * i + 5 * k) % 97 for k in range(1 + i % 4)) for i in range(9)}
# Prompts, and groups of a step with drafts. The second lot leaves other expert ranks and directions
# without tokens. Of the last every owner has sequences for two groups or more.
LOTS = ((PROMPTS, 1), ({"alone": (5, 17, 3)}, 1), (MANY, 3))
NUM_NEW = 12
MODEL = tiny_config()
TRAIN = TrainConfig(
    steps=1, seq_len=12, micro_batch_size=2, micro_batches=4, optimizer="adamw", dtype="float64"
)
LAYOUTS = (
    Layout(pipeline=2, experts=2, schedule="dualpipe"),
    Layout(pipeline=4, schedule="1f1b"),
    Layout(pipeline=2, experts=2, schedule="dualpipev"),
)


def generate(run_step, counts, prompts, draft_tokens=0, answers=None):
    """Tokens by request, the number of steps, of drafts that came true, and of sequences that the
    emptiest owner ever had."""
    limits = replace(LIMITS, draft_tokens=draft_tokens, draft_modules=min(2, draft_tokens))
    scheduler = Scheduler(owners=owners(*counts), limits=limits, eos_id=None)
    for seed, (name, prompt) in enumerate(prompts.items()):
        params = SamplingParams(max_tokens=NUM_NEW, temperature=seed % 2, top_p=0.9)
        scheduler.add(Request(request_id=name, prompt_ids=prompt, params=params, seed=seed))
    said = {name: [] for name in prompts}
    steps = least = 0
    while (plan := scheduler.plan()) is not None:
        steps += 1
        by_owner = [len(plan.sequences(owner)) for owner in owners(*counts)]
        least = max(least, min(by_owner))
        told = {name: len(tokens) for name, tokens in said.items()}
        sampled = []
        for token in run_step(plan):
            assert isinstance(token, Sampled)
            told[token.request_id] += 1
            if answers is not None:
                ids = answers[token.request_id][told[token.request_id] :]
                token = replace(token, draft_ids=tuple(ids[: len(token.draft_ids)]))
            sampled.append(token)
        for progress in scheduler.apply(sampled):
            said[progress.request_id].append(progress.sampled.token_id)
    return said, steps, scheduler.counts.drafts.num_accepted_tokens, least


def serve(rank: int, ports):
    """Every rank plays the engine with the same scheduler; results travel by an object gather."""
    results = []
    for layout, port in zip(LAYOUTS, ports):
        trainer = make_trainer(rank, MODEL, layout, TRAIN, port)
        stages = {
            direction: StageRunner(
                trainer.held.stages[stage],
                trainer.dispatches[direction],
                num_blocks=LIMITS.num_blocks,
                block_size=LIMITS.block_size,
                draft_modules=2,
            )
            for direction, stage in enumerate(trainer.schedule.stage_of[trainer.at.pipeline])
        }
        walks = {
            groups: StepRunner(
                replica=trainer.at.replica,
                expert=trainer.at.expert,
                stages=stages,
                entries={direction: trainer.schedule.entry_of(direction) for direction in stages},
                numbers=dict(enumerate(trainer.schedule.stage_of[trainer.at.pipeline])),
                num_stages=trainer.schedule.num_stages,
                groups=groups,
                transport=PipelineTransport(
                    trainer.links, trainer.schedule, trainer.at.pipeline, trainer.device
                ),
            )
            for groups in {groups for _, groups in LOTS}
        }

        def run_step(groups, plan, walks=walks):
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, walks[groups].run(plan))
            return [sampled for part in parts for sampled in part]

        counts = (layout.replicas, layout.experts, len(trainer.schedule.entries))
        for prompts, groups in LOTS:
            plain = generate(partial(run_step, 1), counts, prompts)
            step = partial(run_step, groups)
            own = generate(step, counts, prompts, draft_tokens=3)
            right = generate(step, counts, prompts, draft_tokens=3, answers=plain[0])
            results.append((plain, own, right))
        trainer.close()
    return results


@pytest.mark.multiproc
def test_workers_say_the_same_with_drafts_at_once_and_in_groups():
    by_rank = run_ranks(serve, 4, [free_port() for _ in LAYOUTS])
    assert all(results == by_rank[0] for results in by_rank)
    for plain, own, right in by_rank[0]:
        assert plain[0] == own[0] == right[0]
        assert right[1] < plain[1]
        assert right[2] > 0
    of_many = by_rank[0][len(LOTS) - 1 :: len(LOTS)]
    assert all(drafted[3] > 1 for _, *both in of_many for drafted in both)
