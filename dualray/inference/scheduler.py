"""The inference scheduler: which tokens of which request run in the next step.

Pure decisions over plain data: no clock, no tensor, no process. Requests wait first come first
served, each is admitted to one owner, and joins at the next step (continuous batching): prompts
and single tokens run together. An owner that runs out of blocks sends its youngest sequence
back to its place in the queue, from where it is run again from its first token, by whichever
owner then has room; what it has said counts, so that nobody can tell from the tokens.
Finishing, cancelling or a deadline returns the blocks at once; steps run one after another, so
a block is only rewritten by a later step than the one that may still be in flight.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from dualray.inference.draft_length import DraftLengths
from dualray.inference.limits import Limits
from dualray.inference.owner_batch import OwnerBatch
from dualray.inference.owner_choice import choose_owner
from dualray.inference.plan import Owner, Sampled, SequencePlan, StepPlan
from dualray.inference.request import FinishReason, QueueFullError, Request
from dualray.inference.sequence import Sequence
from dualray.inference.speculation import DraftCounts, Speculation

_LEAD_PART = 4
"""An owner may run a quarter of max_batch sequences more than another for its cache's sake."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A request's new token, and why it ended if it did."""

    request_id: str
    sampled: Sampled
    finish: FinishReason | None
    stop_token: bool = False
    """The token itself ended the completion and is no part of the text."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache and not run."""
    num_preemptions: int = 0
    """How often the request has lost its blocks so far."""


@dataclass(kw_only=True)
class CacheCounts:
    """What the cache was asked and what it cost, counted as vLLM counts."""

    num_preemptions: int = 0
    prefix_queries: int = 0
    """Tokens of prompts that were looked up."""
    prefix_hits: int = 0
    """Tokens of prompts that were found and not run."""
    drafts: DraftCounts = field(default_factory=DraftCounts)


class Scheduler:
    """Admits, plans and retires requests. See the module's essay.

    Blocks are found again within one scheduler only: other weights need another one.
    """

    def __init__(
        self,
        *,
        owners: Iterable[Owner],
        limits: Limits,
        eos_id: int | None,
        counts: CacheCounts | None = None,
        lengths: DraftLengths | None = None,
    ) -> None:
        """`counts` go on from an earlier scheduler. Where limits allow drafts `lengths` decides how
        many, by default as many as pay."""
        self.limits = limits
        self.eos_id = eos_id
        self.counts = CacheCounts() if counts is None else counts
        self._batches = {owner: OwnerBatch(owner, limits, eos_id) for owner in owners}
        if lengths is None and limits.draft_tokens:
            lengths = DraftLengths(limits.draft_tokens)
        self._lengths = lengths
        self._waiting: deque[Sequence] = deque()
        """In the order of arrival."""
        self._running: dict[str, Sequence] = {}
        self._num_arrived = 0
        self._step = 0

    @property
    def num_waiting(self) -> int:
        """Preempted ones included."""
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
        """Fraction of all blocks that running sequences use."""
        pools = [batch.pool for batch in self._batches.values()]
        return 1 - sum(pool.num_free for pool in pools) / sum(pool.num_blocks for pool in pools)

    def free_blocks(self) -> dict[Owner, int]:
        """Blocks that no running sequence uses; some may still be found by later prompts."""
        return {owner: batch.pool.num_free for owner, batch in self._batches.items()}

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
        sequence = Sequence.of(request, self._num_arrived, self.limits.max_context)
        if self._lengths is not None:
            sequence.speculation = Speculation(lengths=self._lengths)
        self._waiting.append(sequence)
        self._num_arrived += 1

    def remove(self, request_id: str, *, spoiled: bool = False) -> bool:
        """Ends a request wherever it is and frees its blocks; False when it is not known.

        What a `spoiled` one has left in the cache is not used again.
        """
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self._batch_of(sequence).remove(sequence, spoiled=spoiled)
            return True
        for sequence in self._waiting:
            if sequence.request.request_id == request_id:
                self._waiting.remove(sequence)
                return True
        return False

    def lose(self, replica: int) -> list[str]:
        """Forgets a replica whose workers are gone; the ids of the requests that ran there."""
        self._batches = {o: b for o, b in self._batches.items() if o.replica != replica}
        lost = [
            request_id
            for request_id, sequence in self._running.items()
            if sequence.owner is not None and sequence.owner.replica == replica
        ]
        for request_id in lost:
            del self._running[request_id]
        return lost

    def expire(self, now: float) -> list[str]:
        """Removes every request whose deadline has come and returns their ids."""
        known = [s.request for s in (*self._waiting, *self._running.values())]
        late = [r.request_id for r in known if r.deadline is not None and r.deadline <= now]
        for request_id in late:
            self.remove(request_id)
        return late

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to run."""
        self._preempt()
        self._admit()
        self._begin_drafts()
        owners: dict[Owner, tuple[SequencePlan, ...]] = {}
        for owner, batch in self._batches.items():
            if planned := batch.plan():
                owners[owner] = planned
        if not owners:
            return None
        self._step += 1
        return StepPlan(step=self._step, owners=owners)

    def apply(self, results: Iterable[Sampled]) -> list[Progress]:
        """Takes a step's tokens; ended requests free their blocks. Removed ones are skipped."""
        results = list(results)
        self._judge_drafts(results)
        progress = []
        for sampled in results:
            sequence = self._running.get(sampled.request_id)
            if sequence is None:
                continue
            if sequence.num_output == 0:
                self.counts.prefix_hits += sequence.num_cached_tokens
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
                    num_cached_tokens=sequence.num_cached_tokens,
                    num_preemptions=sequence.num_preemptions,
                )
            )
            if sequence.speculation is not None:
                sequence.speculation.drafts = sampled.draft_ids
        return progress

    def took(self, plan: StepPlan, seconds: float) -> None:
        """A step's time, from which it is learnt what drafts cost."""
        sequences = [s for planned in plan.owners.values() for s in planned]
        if self._lengths is not None and all(len(s.ids) == len(s.samples) for s in sequences):
            lanes = {(owner.replica, owner.direction) for owner in plan.owners}
            passes = sum(plan.draft_passes(*lane) for lane in lanes)
            self._lengths.costs.observe(sum(len(s.ids) for s in sequences), passes, seconds)

    def _judge_drafts(self, results: Iterable[Sampled]) -> None:
        for request_id, num_tokens in Counter(s.request_id for s in results).items():
            sequence = self._running.get(request_id)
            if sequence is not None and sequence.speculation is not None:
                sequence.speculation.judge(num_tokens - 1, self.counts.drafts)

    def _begin_drafts(self) -> None:
        if self._lengths is not None:
            running = self._running.values()
            own = [s.speculation.acceptance for s in running if s.speculation is not None]
            owners = [s.owner for s in running if s.owner is not None]
            lanes = {(owner.replica, owner.direction) for owner in owners}
            self._lengths.begin_step(own, len(lanes))

    def check_pool(self) -> None:
        """Asserts that every block in use is a running sequence's, as often as it is in use."""
        for batch in self._batches.values():
            batch.check()
        assert self._running or not self.cache_usage, "blocks were lost"

    def _preempt(self) -> None:
        for batch in self._batches.values():
            for sequence in batch.make_room():
                self.counts.num_preemptions += 1
                del self._running[sequence.request.request_id]
                place = sum(other.arrival < sequence.arrival for other in self._waiting)
                self._waiting.insert(place, sequence)

    def _admit(self) -> None:
        """Admits from the head of the queue only, so that a long request is never overtaken."""
        while self._waiting:
            sequence = self._waiting[0]
            candidates = {
                owner: candidate
                for owner, batch in self._batches.items()
                if (candidate := batch.candidate(sequence)) is not None
            }
            owner = choose_owner(candidates, self.limits.max_batch // _LEAD_PART)
            if owner is None:
                return
            self._waiting.popleft()
            self._running[sequence.request.request_id] = sequence
            if self.limits.prefix_cache and sequence.reuses and not sequence.num_preemptions:
                self.counts.prefix_queries += len(sequence.ids)
            self._batches[owner].admit(sequence)

    def _batch_of(self, sequence: Sequence) -> OwnerBatch:
        assert sequence.owner is not None, "a running sequence has an owner"
        return self._batches[sequence.owner]


def owners(replicas: int, experts: int, directions: int) -> tuple[Owner, ...]:
    """All owners of a layout, neighbours differing in direction first, then in expert rank."""
    return tuple(
        Owner(replica=r, expert=e, direction=d)
        for r in range(replicas)
        for e in range(experts)
        for d in range(directions)
    )
