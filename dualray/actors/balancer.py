"""Keeps experts evenly loaded while their workers serve.

Between two steps of the engine nobody computes, so that is when it asks the workers what their
experts did and lets experts move. Requests wait as they would for a longer step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.rebalancing import Rebalancing


class ServingBalancer:
    """Looks at the loads every so many engine steps. `workers` are handles of all, by rank.

    `saw` hears what the workers said.
    """

    def __init__(
        self,
        rebalancing: Rebalancing,
        workers: Sequence[Any],
        saw: Callable[[Sequence[ExpertWork]], None] | None = None,
    ) -> None:
        self.rebalancing = rebalancing
        self._saw = saw
        self.migrations: list[str] = []
        """What was done and why, a sentence each."""
        self._workers = tuple(workers)
        self._steps = 0

    async def before_step(self) -> None:
        """A step is to come. Raises what Ray raises if a worker is lost."""
        if self._steps and self._steps % self.rebalancing.every == 0:
            await self._look()
        self._steps += 1

    async def _look(self) -> None:
        works = await asyncio.gather(*(w.expert_work.remote() for w in self._workers))
        if self._saw is not None:
            self._saw(works)
        proposal = self.rebalancing.saw(works, step=self._steps, steps=self.rebalancing.every)
        if proposal is None or not proposal.adopt:
            return
        moved = await asyncio.gather(
            *(w.move_experts.remote(proposal.placement) for w in self._workers)
        )
        self.rebalancing.moved(proposal.placement, moved)
        self.migrations.append(
            f"{proposal.reason}; slowest rank of a layer {proposal.imbalance_before:.2f} of the "
            f"mean, {proposal.imbalance_after:.2f} foreseen; moved in "
            f"{max(each.seconds for each in moved):.2f} s"
        )
