"""Completions of a whole model in this process: scheduler and stage, without engine or clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dualray.inference.limits import Limits
from dualray.inference.plan import Sampled, StepPlan
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
    finish: FinishReason | None = None


class Completing:
    """`run` completes requests together; plans are kept."""

    def __init__(self, stage: Stage, limits: Limits, eos_id: int | None = None) -> None:
        dispatch = LocalDispatch(stage.config.n_routed_experts)
        runner = StageRunner(
            stage,
            dispatch,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            drafts=limits.draft_tokens > 0,
        )
        self._walk = StepRunner(replica=0, expert=0, stages={0: runner})
        self._limits, self._eos_id = limits, eos_id
        self.plans: list[StepPlan] = []
        self.counts = CacheCounts()

    def run(self, requests: Iterable[Request]) -> dict[str, Completed]:
        scheduler = Scheduler(
            owners=owners(1, 1, 1), limits=self._limits, eos_id=self._eos_id, counts=self.counts
        )
        done = {}
        for request in requests:
            scheduler.add(request)
            done[request.request_id] = Completed()
        while (plan := scheduler.plan()) is not None:
            self.plans.append(plan)
            outcomes = self._walk.run(plan)
            for progress in scheduler.apply([o for o in outcomes if isinstance(o, Sampled)]):
                completed = done[progress.request_id]
                completed.sampled.append(progress.sampled)
                if not progress.stop_token:
                    completed.ids.append(progress.sampled.token_id)
                completed.finish = progress.finish
        return done
