"""Served log-probabilities against the training forward: one process, and right after training.

Prompts of odd lengths run in parts, beside each other and beside single tokens, over blocks
of 4. Training then scores the tokens that serving chose.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import tiny_config, training_context, whole_model
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.inference.plan import Owner, StepPlan
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Limits, Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import PipelineTransport, StepRunner
from dualray.model.config import YarnConfig
from dualray.model.context import RoutingTape
from dualray.model.init import logical_tensors
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig

LIMITS = Limits(num_blocks=16, block_size=4, max_batch=4, max_context=32, max_step_tokens=6)
PROMPTS = {
    "a": (5, 17, 3, 60, 8, 9, 11, 2),
    "b": (1, 2, 3),
    "c": (90,),
    "d": (4, 4, 8, 15, 16, 23),
    "e": (31, 7),
}
NUM_NEW = 9
# Absorbed attention and other batch shapes sum in another order: rounding only.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_scheduler(*owner_counts: int, prompts=PROMPTS) -> Scheduler:
    scheduler = Scheduler(owners=owners(*owner_counts), limits=LIMITS, eos_id=None)
    for seed, (name, prompt) in enumerate(prompts.items()):
        params = SamplingParams(max_tokens=NUM_NEW)
        scheduler.add(Request(request_id=name, prompt_ids=prompt, params=params, seed=seed))
    return scheduler


def generate(scheduler: Scheduler, run_step, prompts=PROMPTS):
    """All tokens by request, and the log-probabilities of the new ones."""
    tokens = {name: list(prompt) for name, prompt in prompts.items()}
    logprobs = {name: [] for name in prompts}
    while (plan := scheduler.plan()) is not None:
        for progress in scheduler.apply(run_step(plan)):
            tokens[progress.request_id].append(progress.sampled.token_id)
            logprobs[progress.request_id].append(progress.sampled.logprob)
    return tokens, logprobs


def training_logprobs(stage: Stage, ids, tape: RoutingTape | None = None) -> torch.Tensor:
    """Log-probability of each of the last NUM_NEW tokens under the training forward."""
    ctx = training_context(stage.config, (len(ids),), tape=tape)
    with torch.no_grad():
        ids_T = torch.tensor(ids)
        logits = stage.logits(stage(stage.embed(ids_T, ctx), ctx), ctx)
        scored = torch.log_softmax(logits, -1)[:-1].gather(1, ids_T[1:, None]).squeeze(1)
    return scored[-NUM_NEW:]


class Recorder:
    """Runs steps on a whole model and keeps every request's expert choices, row by row."""

    def __init__(self, stage: Stage) -> None:
        dispatch = LocalDispatch(stage.config.n_routed_experts)
        self._runner = StageRunner(
            stage, dispatch, num_blocks=LIMITS.num_blocks, block_size=LIMITS.block_size
        )
        self.shared_steps = 0
        self._rows: dict[tuple[str, int], list[torch.Tensor]] = {}

    def __call__(self, plan: StepPlan):
        sequences = plan.sequences(Owner(0, 0, 0))
        self.shared_steps += len({len(s.ids) > 1 for s in sequences}) == 2
        tape = RoutingTape()
        sampled = self._runner.run(sequences, None, tape).sampled
        for layer, choices in tape.choices.items():
            parts = choices.split([len(s.ids) for s in sequences])
            for sequence, part in zip(sequences, parts):
                self._rows.setdefault((sequence.request_id, layer), []).append(part)
        return sampled

    def choices(self, name: str) -> dict[int, torch.Tensor]:
        """By layer, the choices of a request's tokens in order; the last token never ran."""
        return {layer: torch.cat(p) for (owner, layer), p in self._rows.items() if owner == name}


def biased_scores(stage: Stage, ids) -> dict[int, torch.Tensor]:
    """By layer the training forward's scores plus bias, (T, E)."""
    found = {}

    def keep(router, inputs, routing):
        found[router.layer] = routing.scores_TE + router.e_score_correction_bias

    hooks = [
        stage.layers[str(layer)].mlp.gate.register_forward_hook(keep)
        for layer in stage.layer_range
        if stage.config.is_moe(layer)
    ]
    training_logprobs(stage, ids)
    for hook in hooks:
        hook.remove()
    return found


YARN = YarnConfig(factor=4.0, original_max_position_embeddings=16, mscale_all_dim=1.0)


@pytest.mark.parametrize("rope_scaling", [None, YARN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_and_decode_give_the_training_forwards_logprobs(dtype, rope_scaling):
    stage = whole_model(tiny_config(rope_scaling=rope_scaling), dtype=dtype)
    recorder = Recorder(stage)
    tokens, served = generate(make_scheduler(1, 1, 1), recorder)
    assert recorder.shared_steps >= 2
    for name, ids in tokens.items():
        got = torch.tensor(served[name], dtype=dtype)
        assert len(got) == NUM_NEW
        # With the served expert choices replayed.
        chosen = recorder.choices(name)
        padded = {i: torch.cat((c, c[-1:])) for i, c in chosen.items()}  # the last token's row
        replayed = training_logprobs(stage, ids, RoutingTape(padded, replay=True))
        torch.testing.assert_close(got, replayed, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        # Free: a choice may differ in a near-tie only; without one the numbers agree as well.
        differs = False
        for layer, scores in biased_scores(stage, ids).items():
            free = RoutingTape()
            training_logprobs(stage, ids, free)
            for row, (mine, theirs) in enumerate(zip(chosen[layer], free.choices[layer])):
                odd = set(mine.tolist()) ^ set(theirs.tolist())
                if odd:
                    differs = True
                    gap = scores[row, list(odd)].max() - scores[row, list(odd)].min()
                    assert gap < 1e-5, f"request {name}, layer {layer}, token {row}"
        if not differs:
            expected = training_logprobs(stage, ids)
            torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


MODEL = tiny_config()
TRAIN = TrainConfig(
    steps=2, seq_len=12, micro_batch_size=2, micro_batches=4, lr=1e-2, warmup_steps=1,
    optimizer="adamw", dtype="float64", gamma=0.01, alpha=1e-3, mtp_lambda=0.3,
)  # fmt: skip
LAYOUTS = (
    Layout(pipeline=2, experts=2, schedule="dualpipe"),
    Layout(pipeline=4, schedule="1f1b"),
    Layout(pipeline=2, replicas=2, schedule="dualpipe"),
    Layout(pipeline=2, experts=2, schedule="dualpipev"),
)


# The second lot finds reused blocks, and leaves other expert ranks and directions without tokens.
# Of the third each owner has several that begin alike, and read what others of that step write.
TWINS = {f"twin {last}": (5, 17, 3, 60, 8, 9, 11, 2, 13, last) for last in range(10)}
LOTS = (PROMPTS, {"alone": (5, 17, 3)}, TWINS)


def train_and_serve(rank: int, ports):
    """Every rank plays the engine with the same scheduler; results travel by an object gather."""
    results = []
    for layout, port in zip(LAYOUTS, ports):
        trainer = make_trainer(rank, MODEL, layout, TRAIN, port)
        source = tokens_for(MODEL, TRAIN)
        for step in range(TRAIN.steps):
            trainer.step(step, source)
        stages = {
            direction: StageRunner(
                trainer.held.stages[stage],
                trainer.dispatches[direction],
                num_blocks=LIMITS.num_blocks,
                block_size=LIMITS.block_size,
            )
            for direction, stage in enumerate(trainer.schedule.stage_of[trainer.at.pipeline])
        }
        transport = PipelineTransport(
            trainer.links, trainer.schedule, trainer.at.pipeline, trainer.device
        )
        walk = StepRunner(
            replica=trainer.at.replica,
            expert=trainer.at.expert,
            stages=stages,
            transport=transport,
            entries={direction: trainer.schedule.entry_of(direction) for direction in stages},
        )

        def run_step(plan, walk=walk):
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, walk.run(plan))
            return [sampled for part in parts for sampled in part]

        counts = (layout.replicas, layout.experts, len(trainer.schedule.entries))
        served = [
            generate(make_scheduler(*counts, prompts=prompts), run_step, prompts)
            for prompts in LOTS
        ]
        weights = {
            name: view.numpy().copy()
            for stage in trainer.held.stages.values()
            for name, view in logical_tensors(stage).items()
        }
        trainer.close()
        results.append((served, weights))
    return results


def whole_from(parts: list[dict[str, np.ndarray]]) -> Stage:
    """The one-process model with the workers' trained weights."""
    stage = Stage(MODEL).to(torch.float64)
    weights = {name: array for part in parts for name, array in part.items()}
    for name, view in logical_tensors(stage).items():
        view.copy_(torch.from_numpy(weights[name]))
    return stage


@pytest.mark.multiproc
def test_workers_serve_what_they_trained():
    by_rank = run_ranks(train_and_serve, 4, [free_port() for _ in LAYOUTS])
    for index, layout in enumerate(LAYOUTS):
        lots = by_rank[0][index][0]
        assert all(by_rank[rank][index][0] == lots for rank in range(4))
        stage = whole_from([by_rank[rank][index][1] for rank in range(4)])
        for prompts, (tokens, served) in zip(LOTS, lots):
            assert tokens.keys() == prompts.keys()
            for name, ids in tokens.items():
                assert len(served[name]) == NUM_NEW, (layout, name)
                torch.testing.assert_close(
                    torch.tensor(served[name], dtype=torch.float64),
                    training_logprobs(stage, ids),
                    atol=1e-9,
                    rtol=1e-9,
                )
