"""A worker's part of a step: its stages over its owners' sequences.

`StepRunner` walks a worker's stages in the order in which hidden states can arrive, and leaves
the transport to two callables, so that the same code serves one process and a pipeline of
workers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dualray.inference.plan import Outcome, Owner, StepPlan
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_groups import groups_of, num_groups
from dualray.parallel.groups import FORWARD
from dualray.parallel.p2p import PipelineLinks
from dualray.schedule.actions import Schedule


class Transport(Protocol):
    """Carries hidden states to the next stage of a direction and from the one before."""

    def send(self, direction: int, hidden_TD: Tensor) -> None:
        """Starts sending and returns at once; mirrored ranks send to each other first."""
        ...

    def receive(self, direction: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Waits for the hidden states that the stage before has sent."""
        ...

    def drain(self) -> None:
        """Waits until everything sent has left."""
        ...


class PipelineTransport:
    """`Transport` over the process groups that training used for its activations."""

    def __init__(
        self, links: PipelineLinks, schedule: Schedule, pipeline_rank: int, device: torch.device
    ) -> None:
        self._links = links
        self._schedule = schedule
        self._rank = pipeline_rank
        self._device = device
        self._handed: dict[int, deque[Tensor]] = defaultdict(deque)
        """By receiving direction, what goes from one stage of this rank to the next."""

    def send(self, direction: int, hidden_TD: Tensor) -> None:
        to = self._schedule.downstream(self._rank, direction)
        assert to is not None, "the last stage sends nothing on"
        rank, to_direction = to
        if rank == self._rank:
            self._handed[to_direction].append(hidden_TD)
        else:
            self._links.send(FORWARD, to_direction, hidden_TD, rank)

    def receive(self, direction: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        source = self._schedule.upstream(self._rank, direction)
        assert source is not None, "the first stage receives nothing"
        if source[0] == self._rank:
            return self._handed[direction].popleft()
        return self._links.receive(FORWARD, direction, shape, dtype, self._device, source[0])

    def drain(self) -> None:
        self._links.drain()


class StepRunner:
    """One worker's walk through a step.

    `stages[direction]` is the stage that this worker applies to that direction. Its requests
    entered in direction `entries[direction]` and belong to that: another one on the way back of a
    V, by default the same. `numbers[direction]` is the stage's number in a pipeline of
    `num_stages`; by default there is no other stage than those here. A step is split into `groups`
    groups, by default as many as pay (`step_groups`).
    """

    def __init__(
        self,
        *,
        replica: int,
        expert: int,
        stages: Mapping[int, StageRunner],
        transport: Transport | None = None,
        entries: Mapping[int, int] | None = None,
        numbers: Mapping[int, int] | None = None,
        num_stages: int | None = None,
        groups: int | None = None,
    ) -> None:
        self._replica = replica
        self._expert = expert
        self._stages = stages
        self._entries = {d: d for d in stages} if entries is None else entries
        self._transport = transport
        in_order = sorted(stages, key=lambda d: stages[d].stage.layer_range.start)
        self._numbers = {d: n for n, d in enumerate(in_order)} if numbers is None else numbers
        self._num_stages = len(stages) if num_stages is None else num_stages
        self._groups = groups

    @property
    def cache_bytes(self) -> int:
        """Of the latent caches of all stages."""
        return sum(stage.cache.size_bytes for stage in self._stages.values())

    def run(self, plan: StepPlan) -> list[Outcome]:
        """Runs this worker's stages; returns what was scored and chosen here, if a last stage is
        held.

        Group g reaches stage s in beat g + s. Work is done by beat, then by direction, as in
        `schedule.forward_only`: what it needs was sent in an earlier beat, and sending waits for
        nobody, so no two workers wait for each other. The expert ranks of a stage see the same
        plan and meet in the same order; one without tokens comes with none.
        """
        groups = groups_of(plan, self._replica, self._num_groups(plan))
        work = sorted(
            (index + self._numbers[direction], direction, index)
            for index, group in enumerate(groups)
            for direction in self._stages
            if self._entries[direction] in group.directions(self._replica)
        )
        outcomes: list[Outcome] = []
        for _, direction, index in work:
            outcomes += self._apply(groups[index], direction)
        if self._transport is not None:
            self._transport.drain()
        return outcomes

    def _num_groups(self, plan: StepPlan) -> int:
        if self._groups is not None:
            return self._groups
        num_walks = len(self._stages)
        return num_groups(plan, self._replica, num_stages=self._num_stages, num_walks=num_walks)

    def _apply(self, group: StepPlan, direction: int) -> list[Outcome]:
        """One stage to the group's sequences of one direction."""
        runner, entry = self._stages[direction], self._entries[direction]
        owner = Owner(replica=self._replica, expert=self._expert, direction=entry)
        sequences = group.sequences(owner)
        num_tokens = sum(len(sequence.ids) for sequence in sequences)
        output = runner.run(
            sequences,
            self._input(runner, direction, num_tokens),
            draft_passes=group.draft_passes(self._replica, entry),
        )
        if not runner.stage.is_last and num_tokens:
            assert self._transport is not None
            self._transport.send(direction, output.hidden_TD)
        return [*output.scored, *output.sampled]

    def _input(self, runner: StageRunner, direction: int, num_tokens: int) -> Tensor | None:
        if runner.stage.is_first:
            return None
        shape = (num_tokens, runner.stage.config.hidden_size)
        if not num_tokens:
            return torch.empty(shape, dtype=runner.dtype, device=runner.device)
        assert self._transport is not None
        return self._transport.receive(direction, shape, runner.dtype)
