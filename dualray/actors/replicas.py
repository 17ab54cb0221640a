"""Steps of several replicas, which share no collective while they serve: one may be lost and the
others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dualray.actors.plan_channel import Door, PlanChannels
from dualray.errors import RunError
from dualray.inference.plan import Outcome, StepPlan


class ReplicasLostError(Exception):
    """Workers are gone, and with them their whole replica, but another replica is there."""

    def __init__(self, reasons: Mapping[int, RunError], outcomes: Sequence[Outcome]) -> None:
        super().__init__(f"replicas {sorted(reasons)} are lost")
        self.reasons = dict(reasons)
        """Why, by replica."""
        self.outcomes = list(outcomes)
        """What the other replicas gave in the same step."""


class Replicas:
    """Connections to the workers of every replica that is whole. Use from one event loop."""

    def __init__(self) -> None:
        self._channels: dict[int, PlanChannels] = {}
        self.lost: dict[int, str] = {}
        """Why a replica runs no more steps."""

    async def open(self, doors: Sequence[Door], num_replicas: int) -> None:
        """Connects to all workers, by rank: those of a replica are neighbours.

        Raises:
            RunError: a worker cannot be reached.
        """
        self.close()
        self.lost.clear()
        size = len(doors) // num_replicas
        for replica in range(num_replicas):
            first = replica * size
            self._channels[replica] = PlanChannels(first_rank=first)
            await self._channels[replica].open(doors[first : first + size])

    def close(self) -> None:
        """Workers run no more plans of this engine."""
        for channels in self._channels.values():
            channels.close()
        self._channels.clear()

    async def run(self, plan: StepPlan) -> list[Outcome]:
        """What the workers of the plan's owners chose and scored; the others hear nothing.

        Raises:
            ReplicasLostError: a worker is lost or has failed, but a replica is left.
            RunError: none is left.
        """
        parts = _by_replica(plan)
        replies = await asyncio.gather(
            *(self._channels[replica].start(part) for replica, part in parts.items()),
            return_exceptions=True,
        )
        outcomes: list[Outcome] = []
        reasons: dict[int, RunError] = {}
        for replica, reply in zip(parts, replies):
            if isinstance(reply, RunError):
                reasons[replica] = reply
            elif isinstance(reply, BaseException):
                raise reply
            else:
                outcomes += [outcome for worker in reply for outcome in worker]
        for replica, reason in reasons.items():
            self._channels.pop(replica).close()
            self.lost[replica] = reason.sentence
        if reasons and not self._channels:
            raise next(iter(reasons.values()))
        if reasons:
            raise ReplicasLostError(reasons, outcomes)
        return outcomes


def _by_replica(plan: StepPlan) -> dict[int, StepPlan]:
    replicas = sorted({owner.replica for owner in plan.owners})
    if len(replicas) == 1:
        return {replicas[0]: plan}
    return {
        replica: replace(
            plan, owners={o: p for o, p in plan.owners.items() if o.replica == replica}
        )
        for replica in replicas
    }
