"""Requests that a test plans by hand, step by step, with drafts from wherever it likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dualray.inference.plan import Drafting, Sampled, SampleSpec, SequencePlan
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage

BLOCK = 4
PROMPT = (5, 17, 3, 60, 8, 9, 11, 2, 44, 31)


def spec(position: int, *, temperature=0.0, seed=3) -> SampleSpec:
    return SampleSpec(
        position=position,
        seed=seed,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        logprobs=None,
    )


def make_runner(stage: Stage, **options) -> StageRunner:
    dispatch = LocalDispatch(stage.config.n_routed_experts)
    values = {"num_blocks": 40, "block_size": BLOCK, "draft_modules": 2} | options
    return StageRunner(stage, dispatch, **values)


class Request:
    """A hand-made scheduler of one request: `parts` cut the prompt, `window` its MTP rows."""

    def __init__(
        self,
        name: str,
        table: Sequence[int],
        *,
        prompt=PROMPT,
        parts=(10,),
        window=0,
        modules=1,
        num_drafts: Callable[[int], int] = lambda position: 0,
        propose: Callable[[list[int]], Sequence[int]] | None = None,
        **sampling,
    ) -> None:
        """`propose` gives drafts in place of the modules'."""
        self.name, self.table, self.window, self.modules = name, tuple(table), window, modules
        self.ids, self.num_run, self.parts = list(prompt), 0, list(parts)
        self.num_prompt = len(prompt)
        self.num_drafts, self.propose, self.sampling = num_drafts, propose, sampling
        self.drafts: tuple[int, ...] = ()
        self.proposed: list[tuple[int, tuple[int, ...]]] = []
        self.steps = 0

    def plan(self) -> SequencePlan:
        self.steps += 1
        first, known = self.num_run, len(self.ids)
        stop = first + self.parts.pop(0) if self.parts else known
        complete = stop == known
        drafts = self.drafts if complete else ()
        self.num_run = stop
        wanted = self.num_drafts(known)
        return SequencePlan(
            request_id=self.name,
            ids=(*self.ids[first:stop], *drafts),
            first_position=first,
            block_table=self.table,
            samples=tuple(spec(known + i, **self.sampling) for i in range(len(drafts) + complete)),
            drafting=Drafting(
                first_position=self.window,
                num_drafts=wanted if complete else 0,
                num_passes=max(wanted, self.modules),
                next_ids=tuple(self.ids[stop : stop + self.modules]),
            ),
        )

    def take(self, tokens: list[Sampled]) -> None:
        for token in tokens:
            self.num_run = len(self.ids)
            self.ids.append(token.token_id)
        if tokens:
            self.drafts = tokens[-1].draft_ids
            self.proposed.append((len(self.ids), self.drafts))
            if self.propose is not None:
                self.drafts = tuple(self.propose(self.ids))


def run(runner: StageRunner, requests: Sequence[Request], length: int) -> None:
    while any(len(request.ids) < length for request in requests):
        going = [request for request in requests if len(request.ids) < length]
        plans = [request.plan() for request in going]
        passes = max(plan.drafting.num_passes for plan in plans)
        said = runner.run(plans, None, draft_passes=passes).sampled
        for request in going:
            request.take([token for token in said if token.request_id == request.name])


def plain(stage: Stage, length: int, **sampling) -> list[int]:
    """Tokens without a draft."""
    request = Request("plain", range(20), **sampling)
    runner = make_runner(stage, draft_modules=0)
    while len(request.ids) < length:
        said = runner.run([request.plan()], None).sampled
        request.take(said)
    return request.ids[:length]
