"""A request's bits over pipeline and expert ranks: whoever runs it, whatever runs beside it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer

from dualray.inference.limits import Limits
from dualray.inference.plan import PromptScored, Sampled
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import PipelineTransport, StepRunner
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig

MODEL = tiny_config(hidden_size=64, moe_intermediate_size=32, num_nextn_predict_layers=0)
TRAIN = TrainConfig(
    steps=1, seq_len=12, micro_batch_size=2, micro_batches=4, optimizer="adamw", dtype="float32"
)
LAYOUT = Layout(pipeline=2, experts=2, schedule="dualpipe")
LIMITS = Limits(num_blocks=12, block_size=8, max_batch=4, max_context=64, max_step_tokens=9)
PROMPT = tuple(range(3, 30))


def subject() -> Request:
    params = SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=1, seed=3)
    return Request(request_id="subject", prompt_ids=PROMPT, params=params, seed=3)


def companions(seed: int) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for i in range(14):
        prompt = tuple(rng.randrange(97) for _ in range(rng.randrange(1, 30)))
        params = SamplingParams(max_tokens=rng.randrange(1, 20))
        made.append(Request(request_id=f"c{i}", prompt_ids=prompt, params=params, seed=i))
    return made


def told_of_subject(run_step, counts, requests) -> tuple[list[Sampled], tuple]:
    """What was scored and chosen of it, and its owner."""
    scheduler = Scheduler(owners=owners(*counts), limits=LIMITS, eos_id=None)
    for request in requests:
        scheduler.add(request)
    scored: list[Sampled] = []
    chosen: list[Sampled] = []
    ran_on = set()
    while (plan := scheduler.plan()) is not None:
        ran_on |= {
            owner
            for owner, sequences in plan.owners.items()
            if any(s.request_id == "subject" for s in sequences)
        }
        outcomes = run_step(plan)
        for part in outcomes:
            if isinstance(part, PromptScored):
                scored += part.tokens[len(scored) + 1 - part.first_position :]
        progress = scheduler.apply([o for o in outcomes if isinstance(o, Sampled)])
        chosen += [p.sampled for p in progress if p.request_id == "subject"]
    return scored + chosen, tuple(sorted(ran_on))


def serve(rank: int, port: int):
    """Every rank plays the engine with the same scheduler; results travel by an object gather."""
    torch.set_num_threads(1)
    trainer = make_trainer(rank, MODEL, LAYOUT, TRAIN, port)
    results = []
    for invariant in (True, False):
        stages = {
            direction: StageRunner(
                trainer.held.stages[stage],
                trainer.dispatches[direction],
                num_blocks=LIMITS.num_blocks,
                block_size=LIMITS.block_size,
                invariant=invariant,
            )
            for direction, stage in enumerate(trainer.schedule.stage_of[trainer.at.pipeline])
        }
        walk = StepRunner(
            replica=trainer.at.replica,
            expert=trainer.at.expert,
            stages=stages,
            entries={direction: trainer.schedule.entry_of(direction) for direction in stages},
            numbers=dict(enumerate(trainer.schedule.stage_of[trainer.at.pipeline])),
            num_stages=trainer.schedule.num_stages,
            transport=PipelineTransport(
                trainer.links, trainer.schedule, trainer.at.pipeline, trainer.device
            ),
        )

        def run_step(plan, walk=walk):
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, walk.run(plan))
            return [outcome for part in parts for outcome in part]

        counts = (LAYOUT.replicas, LAYOUT.experts, len(trainer.schedule.entries))
        lots = [[subject()]]
        for seed in range(3):
            others = companions(seed)
            others.insert(1 + 4 * seed, subject())
            lots.append(others)
        results.append([told_of_subject(run_step, counts, lot) for lot in lots])
    trainer.close()
    return results


@pytest.mark.multiproc
def test_companions_on_all_ranks_do_not_change_a_bit():
    by_rank = run_ranks(serve, 4, free_port())
    assert all(results == by_rank[0] for results in by_rank)
    invariant, plain = by_rank[0]
    alone, *crowded = [told for told, _ in invariant]
    assert len(alone) == len(PROMPT) - 1 + 12
    assert all(told == alone for told in crowded)
    assert len({owner for _, ran_on in invariant for owner in ran_on}) > 1
    # Without the mode they do.
    assert any(told != plain[0][0] for told, _ in plain[1:])
