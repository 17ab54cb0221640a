"""The sequences that one owner runs together: their blocks, and their part of a step.

Blocks are taken as sequences grow. Before a step is planned the youngest give theirs back
until every other sequence can run at least one token, so that the oldest always gets on; then
nothing is taken away any more while the step is planned. Admission leaves a block for each
sequence that may still grow, or the next step would undo it.

A block can be found by others as soon as the step that fills it is planned, by a later
sequence of that step too: attention writes all rows of a step before it reads any, and steps
run one after another. So equal prompts that come together run once. A prompt looks for such
blocks again before each of its parts.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from dualray.inference.block_pool import BlockPool
from dualray.inference.limits import Limits
from dualray.inference.owner_choice import Candidate
from dualray.inference.plan import Drafting, Owner, SequencePlan
from dualray.inference.prompt_spec import prompt_spec
from dualray.inference.prompt_turns import prompt_turns
from dualray.inference.sequence import Sequence


class OwnerBatch:
    """One owner's running sequences and its pool of blocks."""

    def __init__(self, owner: Owner, limits: Limits, eos_id: int | None) -> None:
        self.owner = owner
        self.pool = BlockPool(limits.num_blocks)
        self._limits = limits
        self._eos_id = eos_id
        self._sequences: list[Sequence] = []
        """The oldest first, by arrival: one that comes back takes its old place."""

    def candidate(self, sequence: Sequence) -> Candidate | None:
        """What speaks for admitting a waiting sequence here; None if there is no room."""
        load = len(self._sequences)
        if load >= self._limits.max_batch:
            return None
        size = self._limits.block_size
        known = self._known_blocks(sequence)
        if load:
            # What the others lack for the tokens they have, and one block more where it may be.
            promised = sum(
                min(s.blocks_to_end(size), s.blocks_to_run(size) + 1) for s in self._sequences
            )
            wanted = min(sequence.blocks_to_end(size), sequence.blocks_to_run(size) + 1)
            shared = sum(self.pool.is_used(block) for block in known)
            if wanted - shared + promised > self.pool.num_free:
                return None
        return Candidate(load=load, num_reusable=len(known) * size)

    def admit(self, sequence: Sequence) -> None:
        """Starts a waiting sequence that has room here, from what the cache has of it."""
        sequence.owner = self.owner
        insort(self._sequences, sequence, key=attrgetter("arrival"))
        self._reuse(sequence, reserved=0)

    def remove(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        """Takes a sequence's blocks back; nobody finds what a `spoiled` one has filled."""
        self._sequences.remove(sequence)
        self._give_back(sequence, spoiled=spoiled)

    def make_room(self) -> list[Sequence]:
        """Takes the youngest out, until each of the others can run a token; returns them."""
        preempted = []
        lacking = sum(map(self._needs_block, self._sequences))
        while lacking > self.pool.num_free:
            assert len(self._sequences) > 1, "one request always fits"
            sequence = self._sequences.pop()
            lacking -= self._needs_block(sequence)
            self._give_back(sequence)
            sequence.num_preemptions += 1
            preempted.append(sequence)
        return preempted

    def plan(self) -> tuple[SequencePlan, ...]:
        """This step's tokens. Completions come first: no prompt holds up those that stream."""
        budget = self._limits.max_step_tokens
        lacking = sum(map(self._needs_block, self._sequences))
        spare = budget - sum(sequence.num_left == 1 for sequence in self._sequences)
        if any(sequence.num_left > 1 for sequence in self._sequences):
            spare -= spare // 2  # drafts must not hold up prompts either
        prompts: list[Sequence] = []
        planned: list[SequencePlan] = []
        for sequence in self._sequences:
            if sequence.num_left > 1:
                prompts.append(sequence)
                continue
            lacking -= self._needs_block(sequence)
            if sequence.num_left:  # else its token is still awaited
                room = self._room(sequence, reserved=lacking)
                planned.append(self._run(sequence, 1, room=room, budget=1 + spare))
                spare -= len(planned[-1].ids) - 1
                budget -= len(planned[-1].ids)
        for index, most in prompt_turns([s.num_left for s in prompts], budget):
            sequence = prompts[index]
            lacking -= self._needs_block(sequence)
            self._reuse(sequence, reserved=lacking)
            room = self._room(sequence, reserved=lacking)
            count = min(sequence.num_left, most, budget, room)
            if count:
                planned.append(self._run(sequence, count, room=room, budget=count))
                budget -= count
        return tuple(planned)

    def check(self) -> None:
        """Asserts that the blocks in use are those of the running sequences."""
        self.pool.check(sequence.blocks for sequence in self._sequences)

    def _run(self, sequence: Sequence, count: int, *, room: int, budget: int) -> SequencePlan:
        """The next `count` tokens, and drafts as far as `room` and `budget` go beyond them."""
        first, stop = sequence.num_run, sequence.num_run + count
        complete = stop == len(sequence.ids)
        drafts, drafting = self._speculate(sequence, range(first, stop), room=room, budget=budget)
        beyond = drafting.num_drafts - self._limits.draft_modules if drafting else 0
        self._grow(sequence, stop + len(drafts) + max(0, beyond))
        sequence.num_run = stop
        self._make_known(sequence)
        return SequencePlan(
            request_id=sequence.request.request_id,
            ids=(*sequence.ids[first:stop], *drafts),
            first_position=first,
            block_table=sequence.blocks,
            samples=sequence.sample_specs(self._eos_id, drafts) if complete else (),
            prompt=prompt_spec(sequence.request, first, count),
            drafting=drafting,
        )

    def _speculate(
        self, sequence: Sequence, rows: range, *, room: int, budget: int
    ) -> tuple[tuple[int, ...], Drafting | None]:
        """Drafts to verify behind the rows, and what the MTP modules do then."""
        speculation, limits = sequence.speculation, self._limits
        if speculation is None:
            return (), None
        length, history = len(sequence.ids), sequence.history
        # The last token of a completion is no draft's, as a token is chosen behind every draft.
        drafts: tuple[int, ...] = ()
        if rows.stop == length:
            most = min(room, budget) - len(rows)
            most = min(most, sequence.max_length - length - 1)
            drafts = speculation.verify(min(most, history.num_possible(speculation.drafts)))
        drafting = speculation.ask(
            range(rows.start, rows.stop + len(drafts)),
            length=length,
            num_to_come=sequence.max_length - length,
            most=room - len(rows) - len(drafts) + limits.draft_modules,
            num_modules=limits.draft_modules,
            next_ids=tuple(sequence.ids[rows.stop : rows.stop + limits.draft_modules]),
            block_size=limits.block_size,
        )
        return drafts, drafting

    def _needs_block(self, sequence: Sequence) -> bool:
        """Whether its next token needs a block that it does not have."""
        return sequence.num_run == len(sequence.blocks) * self._limits.block_size

    def _room(self, sequence: Sequence, *, reserved: int) -> int:
        """Tokens that it can run in its blocks and those free that are not `reserved`."""
        num_blocks = len(sequence.blocks) + max(0, self.pool.num_free - reserved)
        return num_blocks * self._limits.block_size - sequence.num_run

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes blocks until they hold `num_tokens` tokens."""
        size = self._limits.block_size
        if num_tokens <= len(sequence.blocks) * size:
            return
        blocks = list(sequence.blocks)
        while len(blocks) * size < num_tokens:
            wanted = sequence.blocks_to_end(size) + len(sequence.blocks) - len(blocks)
            blocks.append(self.pool.take(blocks[-1] if blocks else None, wanted))
        sequence.blocks = tuple(blocks)

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its next tokens, all but the last: that one must run to be answered."""
        if not (self._limits.prefix_cache and sequence.reuses):
            return []
        size = self._limits.block_size
        first, stop = sequence.num_run // size, (len(sequence.ids) - 1) // size
        known = []
        for key in sequence.keys(stop, size)[first:stop]:
            block = self.pool.find(key)
            if block is None:
                break
            known.append(block)
        return known

    def _reuse(self, sequence: Sequence, *, reserved: int) -> None:
        """Goes on behind the blocks that are known, as far as others leave room for it.

        A block that it has half filled itself makes way for a whole one.
        """
        size = self._limits.block_size
        blocks = list(sequence.blocks)
        index = first = sequence.num_run // size
        for block in self._known_blocks(sequence):
            # It costs a block if nobody uses it, and one must be left for the tokens behind it.
            if not self.pool.is_used(block) and self.pool.num_free <= reserved + 1:
                break
            self.pool.share(block)
            self.pool.give_back(blocks[index:])
            blocks[index:] = [block]
            index += 1
        if index == first:
            return
        if sequence.speculation is not None:
            sequence.speculation.interrupt()
        if not sequence.num_preemptions:
            sequence.num_cached_tokens += index * size - sequence.num_run
        sequence.blocks = tuple(blocks)
        sequence.num_run, sequence.num_known = index * size, index

    def _make_known(self, sequence: Sequence) -> None:
        """Others may find the blocks that are full by now."""
        if not self._limits.prefix_cache:
            return
        size = self._limits.block_size
        num_full = sequence.num_run // size
        for index in range(sequence.num_known, num_full):
            key = sequence.keys(num_full, size)[index]
            self.pool.make_known(key, sequence.blocks[index])
        sequence.num_known = num_full

    def _give_back(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        if spoiled:
            self.pool.forget(sequence.blocks)
        else:
            self._make_known(sequence)
        self.pool.give_back(sequence.blocks)
        if sequence.speculation is not None:
            sequence.speculation.interrupt()
        sequence.owner, sequence.blocks = None, ()
        sequence.num_run = sequence.num_known = 0
