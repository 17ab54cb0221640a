"""Speculation: what drafts of a trained model are worth, and what they cost.

Scheduler and stage in this process, without a server: the same requests with drafts and without,
in turn. Prompts are passages of text that the model has not seen. Acceptance is measured with
drafts of a fixed length, speed with lengths that adapt to what they cost, as served.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dualray.errors import RunError
from dualray.inference.draft_length import DraftLengths
from dualray.inference.limits import Limits
from dualray.inference.plan import Owner
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners
from dualray.inference.speculation import DraftCounts
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_costs import StepCosts
from dualray.model.moe import LocalDispatch
from dualray.platform.bench.decode import heldout_ids
from dualray.platform.bench.serve_step_costs import step_costs
from dualray.platform.bench.serve_trained import Trained, load_trained, train_model

Say = Callable[[str], None]
_BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class SpeculationCase:
    """What is asked of the model, and how the model is made."""

    corpus: str = "shakespeare"
    num_files: int | None = None
    preset: str = "demo"
    vocabulary: str = "bpe:2048"
    train_steps: int = 900
    """Some minutes on two cores; 600 steps are enough for 60 % greedily."""
    train_seq_len: int = 128
    draft_tokens: int = 3
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    batches: tuple[int, ...] = (1, 8)
    requests: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 5
    """In each of which every side answers all requests once; medians count."""
    threads: int = 1


FULL = SpeculationCase()
QUICK = SpeculationCase(
    corpus="python-stdlib",
    num_files=20,
    preset="tiny",
    vocabulary="bytes",
    train_steps=2,
    train_seq_len=16,
    temperatures=(0.0, 1.0),
    batches=(1, 2),
    requests=2,
    prompt_tokens=8,
    new_tokens=8,
    rounds=1,
)


class _NoCosts(StepCosts):
    """Every draft pays."""

    def seconds(self, rows: int, passes: int) -> float:
        return 1.0


@dataclass(kw_only=True)
class _Answers:
    """All requests once."""

    seconds: float
    steps: int
    ids: dict[str, list[int]] = field(default_factory=dict)


class Side:
    """A scheduler and a stage that answer requests, `batch` of them together."""

    def __init__(
        self, trained: Trained, case: SpeculationCase, batch: int, *, drafts: bool, fixed: bool
    ) -> None:
        config = trained.stage.config
        length = case.prompt_tokens + case.new_tokens
        blocks = batch * -(-length // _BLOCK_SIZE)
        most = case.draft_tokens if drafts else 0
        limits = Limits(
            num_blocks=blocks,
            block_size=_BLOCK_SIZE,
            max_batch=batch,
            max_context=length,
            # A prompt found again would not be run: every round must do the same.
            prefix_cache=False,
            draft_tokens=most,
            draft_modules=min(most, config.num_nextn_predict_layers),
        )
        lengths = DraftLengths(most, _NoCosts()) if fixed else None
        self.scheduler = Scheduler(
            owners=owners(1, 1, 1), limits=limits, eos_id=None, lengths=lengths
        )
        self._runner = StageRunner(
            trained.stage,
            LocalDispatch(config.n_routed_experts),
            num_blocks=blocks,
            block_size=_BLOCK_SIZE,
            draft_modules=limits.draft_modules,
        )

    def answer(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> _Answers:
        """Queues all prompts at once; seconds until the last token."""
        for index, prompt in enumerate(prompts):
            name, ids = str(index), tuple(prompt)
            self.scheduler.add(Request(request_id=name, prompt_ids=ids, params=params, seed=index))
        answers = _Answers(seconds=0.0, steps=0)
        started = time.perf_counter()
        while (plan := self.scheduler.plan()) is not None:
            began = time.perf_counter()
            sequences = plan.sequences(Owner(0, 0, 0))
            passes = plan.draft_passes(0, 0)
            sampled = self._runner.run(sequences, None, draft_passes=passes).sampled
            self.scheduler.took(plan, time.perf_counter() - began)
            for progress in self.scheduler.apply(sampled):
                ids = answers.ids.setdefault(progress.request_id, [])
                ids.append(progress.sampled.token_id)
            answers.steps += 1
        answers.seconds = time.perf_counter() - started
        return answers


def speculation(trained: Trained, case: SpeculationCase, on_part: Say) -> list[dict[str, Any]]:
    """A row for every batch size and temperature.

    Raises:
        RunError: a completion with drafts differs from the one without from its first token on.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return [
            _compare(trained, case, batch, temperature, on_part)
            for batch in case.batches
            for temperature in case.temperatures
        ]
    finally:
        torch.set_num_threads(threads)


def _compare(
    trained: Trained, case: SpeculationCase, batch: int, temperature: float, on_part: Say
) -> dict[str, Any]:
    words = f"{batch} at once, temperature {temperature:g}"
    prompts = heldout_ids(trained.dataset, case.requests, case.prompt_tokens).tolist()
    params = SamplingParams(max_tokens=case.new_tokens, temperature=temperature, ignore_eos=True)
    on_part(f"speculation: {words}, acceptance")
    fixed = Side(trained, case, batch, drafts=True, fixed=True)
    fixed.answer(prompts, params)
    sides = {
        "plain": Side(trained, case, batch, drafts=False, fixed=False),
        "drafting": Side(trained, case, batch, drafts=True, fixed=False),
    }
    # Costs and acceptance are learnt before it counts.
    answers = {name: [side.answer(prompts, params)] for name, side in sides.items()}
    drafts = sides["drafting"].scheduler.counts.drafts
    before = (drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens)
    for number in range(case.rounds):
        on_part(f"speculation: {words}, round {number + 1} of {case.rounds}")
        for name, side in sides.items():
            answers[name].append(side.answer(prompts, params))
    plain, drafting = answers["plain"][1:], answers["drafting"][1:]
    _check(words, plain[0].ids, drafting[0].ids)
    tokens = case.requests * case.new_tokens
    ratios = [p.seconds / d.seconds for p, d in zip(plain, drafting)]
    chosen = [
        after - b
        for after, b in zip(
            (drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens), before
        )
    ]
    return {
        "part": "speculation",
        "corpus": trained.corpus,
        "train_steps": trained.steps,
        "threads": case.threads,
        "batch": batch,
        "temperature": temperature,
        "requests": case.requests,
        "new_tokens": case.new_tokens,
        **_acceptance(fixed.scheduler.counts.drafts, case.draft_tokens),
        "plain": {
            "tokens_per_s": tokens / statistics.median(p.seconds for p in plain),
            "steps": plain[0].steps,
        },
        "drafting": {
            "tokens_per_s": tokens / statistics.median(d.seconds for d in drafting),
            "steps": statistics.median(d.steps for d in drafting),
            "drafts_per_step": chosen[1] / max(1, chosen[0]),
            "acceptance": chosen[2] / max(1, chosen[1]),
        },
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": case.rounds,
        "same_completions": sum(plain[0].ids[n] == drafting[0].ids[n] for n in plain[0].ids),
    }


def _acceptance(counts: DraftCounts, draft_tokens: int) -> dict[str, Any]:
    """By place, of all steps that verified drafts: the second counts only behind the first."""
    by_place = [*counts.accepted_per_pos, *[0] * draft_tokens][:draft_tokens]
    steps = max(1, counts.num_drafts)
    return {
        "draft_tokens": draft_tokens,
        "acceptance_by_place": [accepted / steps for accepted in by_place],
    }


def _check(words: str, plain: dict[str, list[int]], drafting: dict[str, list[int]]) -> None:
    """Later tokens may differ where a near-tie falls another way in a product of other shape."""
    for name, ids in plain.items():
        if ids[0] != drafting[name][0] or len(ids) != len(drafting[name]):
            raise RunError(
                f"with {words}, request {name} begins with token {drafting[name][0]} of "
                f"{len(drafting[name])} with drafts and with {ids[0]} of {len(ids)} without",
                hint="find what drafts have changed before comparing their speed",
            )


def case_dict(quick: bool) -> dict[str, Any]:
    """What a record says of the requests and of the training."""
    return asdict(QUICK if quick else FULL)


def speculation_rows(
    on_part: Say, *, quick: bool = False, checkpoint: Path | None = None, data: Path | None = None
) -> list[dict[str, Any]]:
    """All rows, of a run's checkpoint and its token shards, or of a model that is trained first.

    Raises:
        RunError: the model could not be trained, or drafts have changed a completion.
    """
    case = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="dualray-speculation-") as folder:
        if checkpoint is not None:
            assert data is not None, "a checkpoint comes with its data"
            trained = load_trained(checkpoint, data)
        else:
            on_part(f"speculation: training the {case.preset} preset for {case.train_steps} steps")
            trained = train_model(
                Path(folder),
                corpus=case.corpus,
                num_files=case.num_files,
                preset=case.preset,
                vocabulary=case.vocabulary,
                steps=case.train_steps,
                seq_len=case.train_seq_len,
            )
        on_part("speculation: costs of a step")
        costs = step_costs(trained, batches=case.batches, threads=case.threads, quick=quick)
        return [*costs, *speculation(trained, case, on_part)]
