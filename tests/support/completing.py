"""Completions of a whole model in this process: scheduler and stage, without engine or clock."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dualray.inference.limits import Limits
from dualray.inference.plan import PromptScored, Sampled, StepPlan
from dualray.inference.request import FinishReason, Request
from dualray.inference.scheduler import CacheCounts, Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import StepRunner
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage


@dataclass
class Completed:
    """What came of a request."""

    ids: list[int] = field(default_factory=list)
    """Without the token that ended it, if one did."""
    sampled: list[Sampled] = field(default_factory=list)
    scored: list[Sampled] = field(default_factory=list)
    """The prompt's tokens, where they were scored."""
    finish: FinishReason | None = None


class Completing:
    """`run` completes requests together; plans are kept."""

    def __init__(
        self,
        stage: Stage,
        limits: Limits,
        eos_id: int | None = None,
        *,
        invariant: bool = False,
    ) -> None:
        dispatch = LocalDispatch(stage.config.n_routed_experts)
        runner = StageRunner(
            stage,
            dispatch,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            draft_modules=limits.draft_modules,
            invariant=invariant,
        )
        self._walk = StepRunner(replica=0, expert=0, stages={0: runner})
        self._limits, self._eos_id = limits, eos_id
        self.plans: list[StepPlan] = []
        self.counts = CacheCounts()

    def run(
        self, requests: Iterable[Request], arrivals: Mapping[str, int] | None = None
    ) -> dict[str, Completed]:
        """`arrivals` are the steps before which requests come, all of them at once by default."""
        scheduler = Scheduler(
            owners=owners(1, 1, 1), limits=self._limits, eos_id=self._eos_id, counts=self.counts
        )
        waiting = list(requests)
        done = {request.request_id: Completed() for request in waiting}
        for step in itertools.count():
            for request in list(waiting):
                if arrivals is None or arrivals[request.request_id] <= step:
                    waiting.remove(request)
                    scheduler.add(request)
            plan = scheduler.plan()
            if plan is None:
                if waiting:
                    continue
                break
            self.plans.append(plan)
            outcomes = self._walk.run(plan)
            for part in outcomes:
                if isinstance(part, PromptScored):
                    scored = done[part.request_id].scored
                    scored += part.tokens[len(scored) + 1 - part.first_position :]
            for progress in scheduler.apply([o for o in outcomes if isinstance(o, Sampled)]):
                completed = done[progress.request_id]
                completed.sampled.append(progress.sampled)
                if not progress.stop_token:
                    completed.ids.append(progress.sampled.token_id)
                completed.finish = progress.finish
        return done
