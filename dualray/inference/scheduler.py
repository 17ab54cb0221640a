"""The inference scheduler: which tokens of which request run in the next step.

Pure decisions over plain data: no clock, no tensor, no process. A request waits first come
first served, is admitted to one owner for life, and joins at the next step (continuous
batching): prompts and single tokens run together. Admission reserves the blocks of the
longest completion the request may need, so that nothing is ever preempted. Finishing,
cancelling or a deadline returns the blocks at once; steps run one after another, so a block
is only rewritten by a later step than the one that may still be in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dualray.inference.block_pool import BlockPool, blocks_for
from dualray.inference.plan import Owner, Sampled, SequencePlan, StepPlan
from dualray.inference.prompt_spec import prompt_spec
from dualray.inference.request import FinishReason, QueueFullError, Request
from dualray.inference.sequence import Sequence
from dualray.inference.token_history import TokenHistory


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one owner can hold and run; the same for all owners."""

    num_blocks: int
    """Blocks in an owner's pool."""
    block_size: int
    """Tokens per block."""
    max_batch: int
    """Sequences that an owner runs together."""
    max_context: int
    """Longest prompt plus completion, in tokens."""
    max_step_tokens: int = 2048
    """Tokens of one owner in one step; a longer prompt runs in several steps."""
    max_waiting: int = 1024
    """Requests that may wait for admission, over all owners."""

    def __post_init__(self) -> None:
        # A request of full length must fit, and decoding must never be crowded out.
        assert self.num_blocks >= blocks_for(self.max_context, self.block_size)
        assert self.max_step_tokens >= self.max_batch >= 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A request's new token, and why it ended if it did."""

    request_id: str
    sampled: Sampled
    finish: FinishReason | None
    stop_token: bool = False
    """The token itself ended the completion and is no part of the text."""


class Scheduler:
    """Admits, plans and retires requests. See the module's essay."""

    def __init__(self, *, owners: Iterable[Owner], limits: Limits, eos_id: int | None) -> None:
        self.limits = limits
        self.eos_id = eos_id
        self._pools = {owner: BlockPool(limits.num_blocks) for owner in owners}
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Sequence] = {}
        self._step = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_steps(self) -> int:
        """Steps planned so far."""
        return self._step

    @property
    def cache_usage(self) -> float:
        """Fraction of all blocks that are taken."""
        total = sum(pool.num_blocks for pool in self._pools.values())
        return 1 - sum(pool.num_free for pool in self._pools.values()) / total

    def free_blocks(self) -> dict[Owner, int]:
        return {owner: pool.num_free for owner, pool in self._pools.items()}

    def add(self, request: Request) -> None:
        """Queues a request; it joins at the next `plan` that has room.

        Raises:
            QueueFullError: max_waiting requests wait already.
        """
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait and serve.max_waiting is "
                f"{self.limits.max_waiting}",
                hint="try again later",
            )
        self._waiting.append(request)

    def remove(self, request_id: str) -> bool:
        """Ends a request wherever it is and frees its blocks; False when it is not known."""
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self._pools[sequence.owner].give_back(sequence.blocks)
            return True
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return True
        return False

    def expire(self, now: float) -> list[str]:
        """Removes every request whose deadline has come and returns their ids."""
        known = [*self._waiting, *(s.request for s in self._running.values())]
        late = [r.request_id for r in known if r.deadline is not None and r.deadline <= now]
        for request_id in late:
            self.remove(request_id)
        return late

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to run."""
        self._admit()
        owners: dict[Owner, tuple[SequencePlan, ...]] = {}
        for owner in self._pools:
            planned = self._plan_owner([s for s in self._running.values() if s.owner == owner])
            if planned:
                owners[owner] = planned
        if not owners:
            return None
        self._step += 1
        return StepPlan(step=self._step, owners=owners)

    def apply(self, results: Iterable[Sampled]) -> list[Progress]:
        """Takes a step's tokens; ended requests free their blocks. Removed ones are skipped."""
        progress = []
        for sampled in results:
            sequence = self._running.get(sampled.request_id)
            if sequence is None:
                continue
            sequence.add(sampled.token_id)
            finish, stop_token = sequence.finish(self.eos_id)
            if finish is not None:
                self.remove(sampled.request_id)
            progress.append(
                Progress(
                    request_id=sampled.request_id,
                    sampled=sampled,
                    finish=finish,
                    stop_token=stop_token,
                )
            )
        return progress

    def _admit(self) -> None:
        """Admits from the head of the queue only, so that a long request is never overtaken."""
        while self._waiting:
            request = self._waiting[0]
            max_length = min(
                len(request.prompt_ids) + request.params.max_tokens, self.limits.max_context
            )
            count = blocks_for(max_length, self.limits.block_size)
            owner = self._choose_owner(count)
            if owner is None:
                return
            self._waiting.popleft()
            self._running[request.request_id] = Sequence(
                request=request,
                owner=owner,
                blocks=self._pools[owner].take(count),
                ids=list(request.prompt_ids),
                max_length=max_length,
                history=TokenHistory(request.params, request.prompt_ids),
            )

    def _choose_owner(self, num_blocks: int) -> Owner | None:
        """The owner with the fewest sequences that has room; the first among equals."""
        loads = dict.fromkeys(self._pools, 0)
        for sequence in self._running.values():
            loads[sequence.owner] += 1
        fitting = [
            owner
            for owner, pool in self._pools.items()
            if pool.num_free >= num_blocks and loads[owner] < self.limits.max_batch
        ]
        return min(fitting, key=loads.__getitem__, default=None)

    def _plan_owner(self, sequences: list[Sequence]) -> tuple[SequencePlan, ...]:
        """Running completions first: a long prompt must not stall those already streaming."""
        budget = self.limits.max_step_tokens
        planned = []
        for sequence in sorted(sequences, key=lambda s: s.num_output == 0):
            count = min(len(sequence.ids) - sequence.num_run, budget)
            if count == 0:
                continue
            budget -= count
            first = sequence.num_run
            sequence.num_run += count
            complete = sequence.num_run == len(sequence.ids)
            planned.append(
                SequencePlan(
                    request_id=sequence.request.request_id,
                    ids=tuple(sequence.ids[first : sequence.num_run]),
                    first_position=first,
                    block_table=sequence.blocks,
                    samples=(sequence.sample_spec(self.eos_id),) if complete else (),
                    prompt=prompt_spec(sequence.request, first, count),
                )
            )
        return tuple(planned)


def owners(replicas: int, experts: int, directions: int) -> tuple[Owner, ...]:
    """All owners of a layout, neighbours differing in direction first, then in expert rank."""
    return tuple(
        Owner(replica=r, expert=e, direction=d)
        for r in range(replicas)
        for e in range(experts)
        for d in range(directions)
    )
