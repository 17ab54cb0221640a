"""Groups of sequences that follow each other through the stages, against one step for all."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.stages import split_stages
from support.training import make_trainer

from dualray.inference.plan import Drafting, Owner, SampleSpec, SequencePlan, StepPlan
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Limits, Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_groups import FIXED_TOKENS, groups_of, num_groups
from dualray.inference.step_runner import PipelineTransport, StepRunner
from dualray.model.moe import LocalDispatch
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig
from dualray.schedule.forward_only import forward_only
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import simulate

BLOCK = 4


def sequence(name: str, length: int, block: int = 0, passes: int = 0) -> SequencePlan:
    spec = SampleSpec(
        position=length, seed=0, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, logprobs=None
    )
    drafting = Drafting(first_position=0, num_drafts=0, num_passes=passes)
    return SequencePlan(
        request_id=name,
        ids=tuple((7 * i + len(name) + block) % 90 for i in range(length)),
        first_position=0,
        block_table=tuple(range(block, block + -(-length // BLOCK))),
        samples=(spec,),
        drafting=drafting if passes else None,
    )


def step(*lengths_of_owner: tuple[Owner, list[int]]) -> StepPlan:
    return StepPlan(
        step=3,
        owners={
            owner: tuple(sequence(f"{owner}{i}", length, 4 * i) for i, length in enumerate(lengths))
            for owner, lengths in lengths_of_owner
        },
    )


@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), min_size=1, max_size=4),
    count=st.integers(1, 6),
)
def test_groups_together_are_the_step_in_its_order(lengths, count):
    mine = [(Owner(1, i // 2, i % 2), each) for i, each in enumerate(lengths)]
    plan = step(*mine, (Owner(0, 0, 0), [1]))
    groups = groups_of(plan, 1, count)
    assert [group.step for group in groups] == [3] * count
    for owner, _ in mine:
        joined = [s for group in groups for s in group.sequences(owner)]
        assert joined == list(plan.sequences(owner))
        # No group is above its share by more than its two outermost sequences.
        sizes = [[len(s.ids) for s in group.sequences(owner)] for group in groups]
        share = sum(map(sum, sizes)) / count
        assert all(sum(each[1:-1]) <= share for each in sizes)
    assert all(sequences for group in groups for sequences in group.owners.values())
    assert not any(owner.replica == 0 for group in groups for owner in group.owners)


def test_a_group_is_walked_by_all_expert_ranks_if_one_has_tokens_and_drafts_are_its_own():
    plan = StepPlan(
        step=1,
        owners={
            Owner(0, 0, 0): (sequence("a", 5), sequence("b", 5, 2, passes=2)),
            Owner(0, 1, 1): (sequence("c", 3, passes=1),),
        },
    )
    first, second = groups_of(plan, 0, 2)
    assert (first.directions(0), second.directions(0)) == ((0,), (0, 1))
    assert (first.draft_passes(0, 0), second.draft_passes(0, 0)) == (0, 2)
    assert second.draft_passes(0, 1) == 1


def test_how_many_groups_pay():
    def groups(num_tokens, num_stages, num_walks, num_sequences=64):
        lengths = [num_tokens // num_sequences] * num_sequences
        return num_groups(
            step((Owner(0, 0, 0), [1]), (Owner(0, 0, 1), lengths), (Owner(1, 0, 0), [99] * 99)),
            0,
            num_stages=num_stages,
            num_walks=num_walks,
        )

    assert groups(64 * FIXED_TOKENS, 2, 2) == 1  # nobody idles
    assert groups(64, 1, 1) == 1  # no pipeline
    assert groups(64 * FIXED_TOKENS, 4, 2) == 8
    assert groups(64 * FIXED_TOKENS, 4, 2, num_sequences=3) == 3
    assert groups(4, 4, 2, num_sequences=4) == 1  # a few tokens are dear apart
    assert groups(64 * FIXED_TOKENS, 8, 2) == 14
    empty = StepPlan(step=1, owners={})
    assert num_groups(empty, 0, num_stages=4, num_walks=2) == 1


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_idle_beats_are_those_of_the_formula(num_ranks):
    """P - W + G*W beats, of which a worker is idle for P - W, with DualPipe's W = 2."""
    schedule = make_schedule("dualpipe", num_ranks, 2 * num_ranks)
    for count in (1, 2, 3, 5):
        timeline = simulate(forward_only(schedule, 2 * count))
        assert timeline.makespan == num_ranks - 2 + 2 * count
        assert timeline.idle == (num_ranks - 2,) * num_ranks


class Wires:
    """Transport between workers that walk in threads of one process."""

    def __init__(self, schedule, rank, queues, sent):
        self._schedule, self._rank, self._queues, self._sent = schedule, rank, queues, sent

    def send(self, direction, hidden_TD):
        self._sent[self._rank].append(direction)
        self._queues[self._schedule.downstream(self._rank, direction)].put(hidden_TD)

    def receive(self, direction, shape, dtype):
        hidden = self._queues[self._rank, direction].get(timeout=60)
        assert (tuple(hidden.shape), hidden.dtype) == (shape, dtype)
        return hidden

    def drain(self):
        pass


def walk(plans, kind, num_ranks, groups):
    """Outcomes of `plans` on a whole pipeline, as (request, token, log-probability), by rank."""
    config = tiny_config(num_hidden_layers=4, num_nextn_predict_layers=0)
    schedule = make_schedule(kind, num_ranks, 2 * num_ranks)
    queues, sent = defaultdict(Queue), defaultdict(list)
    for rank in range(num_ranks):
        for direction in range(schedule.num_directions):
            _ = queues[rank, direction]  # before there are threads
    runners = []
    for rank in range(num_ranks):
        numbers = dict(enumerate(schedule.stage_of[rank]))
        copies = [split_stages(config, schedule.num_stages) for _ in numbers]
        stages = {
            direction: StageRunner(
                copies[direction][number],
                LocalDispatch(config.n_routed_experts),
                num_blocks=64,
                block_size=BLOCK,
            )
            for direction, number in numbers.items()
        }
        runners.append(
            StepRunner(
                replica=0,
                expert=0,
                stages=stages,
                transport=Wires(schedule, rank, queues, sent),
                entries={d: schedule.entry_of(d) for d in numbers},
                numbers=numbers,
                num_stages=schedule.num_stages,
                groups=groups,
            )
        )
    barrier = threading.Barrier(num_ranks)

    def run(runner):
        found = []
        for plan in plans:
            barrier.wait(60)
            found += [(s.request_id, s.token_id, s.logprob) for s in runner.run(plan)]
        return found

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, runners)), sent


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev", "1f1b"])
def test_groups_give_the_bits_of_as_many_steps(kind):
    """The same shapes in the same order, so nothing may differ; the V hands over in one process."""
    num_ranks = 2 if kind == "dualpipev" else 4
    directions = (0, 1) if kind == "dualpipe" else (0,)
    plan = step(*((Owner(0, 0, d), [5, 1, 1, 9 - d, 2]) for d in directions))
    grouped, sent = walk([plan], kind, num_ranks, groups=3)
    in_turn, _ = walk(groups_of(plan, 0, 3), kind, num_ranks, groups=1)
    assert [sorted(rank) for rank in grouped] == [sorted(rank) for rank in in_turn]
    assert sum(map(len, grouped)) == 5 * len(directions)
    if kind == "dualpipe":
        # Rank 1 sends its three groups of direction 0 in beats 1 to 3, of direction 1 in 2 to 4.
        assert sent[1] == [0, 0, 1, 0, 1, 1]
    whole, _ = walk([plan], kind, num_ranks, groups=1)
    tokens = [{name: token for name, token, _ in rank} for rank in grouped]
    assert tokens == [{name: token for name, token, _ in rank} for rank in whole]


LIMITS = Limits(num_blocks=32, block_size=BLOCK, max_batch=6, max_context=32, max_step_tokens=16)
TRAIN = TrainConfig(
    steps=1, seq_len=12, micro_batch_size=1, micro_batches=8, lr=1e-2, optimizer="adamw",
    dtype="float64",
)  # fmt: skip
LAYOUTS = (
    Layout(pipeline=2, experts=2, schedule="dualpipe"),
    Layout(pipeline=4, schedule="dualpipe"),
    Layout(pipeline=2, experts=2, schedule="dualpipev"),
)


def serve_in_groups(rank, ports):
    """Tokens and log-probabilities by layout and number of groups; every rank plays the engine."""
    model = tiny_config(num_nextn_predict_layers=0)
    found = []
    for layout, port in zip(LAYOUTS, ports):
        trainer = make_trainer(rank, model, layout, TRAIN, port)
        schedule, at = trainer.schedule, trainer.at
        numbers = dict(enumerate(schedule.stage_of[at.pipeline]))
        for groups in (1, 3):
            runner = StepRunner(
                replica=0,
                expert=at.expert,
                stages={
                    direction: StageRunner(
                        trainer.held.stages[number],
                        trainer.dispatches[direction],
                        num_blocks=LIMITS.num_blocks,
                        block_size=BLOCK,
                    )
                    for direction, number in numbers.items()
                },
                transport=PipelineTransport(trainer.links, schedule, at.pipeline, trainer.device),
                entries={d: schedule.entry_of(d) for d in numbers},
                numbers=numbers,
                num_stages=schedule.num_stages,
                groups=groups,
            )
            scheduler = Scheduler(
                owners=owners(1, layout.experts, len(schedule.entries)), limits=LIMITS, eos_id=None
            )
            for index in range(9):
                params = SamplingParams(max_tokens=5, temperature=0.0)
                ids = tuple((5 * index + 3 * i) % 90 for i in range(1 + 3 * index % 13))
                scheduler.add(Request(request_id=str(index), prompt_ids=ids, params=params, seed=0))
            chosen = {str(index): [] for index in range(9)}
            while (plan := scheduler.plan()) is not None:
                parts = [None] * dist.get_world_size()
                dist.all_gather_object(parts, runner.run(plan))
                for progress in scheduler.apply([each for part in parts for each in part]):
                    sampled = progress.sampled
                    chosen[progress.request_id].append((sampled.token_id, sampled.logprob))
            found.append(chosen)
        trainer.close()
    return found


@pytest.mark.multiproc
def test_workers_choose_the_same_tokens_in_groups():
    by_rank = run_ranks(serve_in_groups, 4, [free_port() for _ in LAYOUTS])
    assert all(found == by_rank[0] for found in by_rank)
    whole, grouped = by_rank[0][0::2], by_rank[0][1::2]
    for one, other in zip(whole, grouped):
        for name, chosen in one.items():
            assert len(chosen) == 5
            tokens, logprobs = zip(*chosen)
            others, other_logprobs = zip(*other[name])
            assert tokens == others
            # Other batch shapes sum in another order; float64.
            torch.testing.assert_close(
                torch.tensor(logprobs), torch.tensor(other_logprobs), atol=1e-9, rtol=0
            )
