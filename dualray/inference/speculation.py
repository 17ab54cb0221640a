"""What one sequence speculates with: the drafts it was handed, and how many it asks for next.

The MTP modules see of a sequence only what they ran without a gap, from the first position of a
window on, which is a block's. Where drafts were given up for a while, where a prompt was found
in the cache, or where a preempted sequence runs again, the window begins anew at the next block:
rows that the modules lack are never made up for, which costs some acceptance and nothing else.
Of a prompt they run its last part only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dualray.inference.draft_length import Acceptance, DraftLengths
from dualray.inference.plan import Drafting

PROMPT_WINDOW = 64
"""Tokens of a prompt, at its end, that go through the modules, and up to a block more. The demo's
model, greedy: 64.5 % of its first drafts come true behind a window of 64 tokens of the prompt, and
63.8 % behind one of 16. Its four layers take a quarter longer for a prompt that has a fifth to
walk, which the first token waits for."""


@dataclass(kw_only=True)
class DraftCounts:
    """What was drafted and how much of it came true, counted as vLLM counts."""

    num_drafts: int = 0
    """Steps of a sequence that verified drafts."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)
    """By place, from the first draft on."""

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """A sequence's step."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        lacking = num_accepted - len(self.accepted_per_pos)
        self.accepted_per_pos += [0] * lacking
        for place in range(num_accepted):
            self.accepted_per_pos[place] += 1


@dataclass(kw_only=True, eq=False)
class Speculation:
    """One sequence's drafts: for each of its steps `verify` first, then `ask`, then `judge`."""

    lengths: DraftLengths
    drafts: tuple[int, ...] = ()
    """What may come behind its last token."""
    _num_verified: int = 0
    _window: int | None = None

    def __post_init__(self) -> None:
        self.acceptance: Acceptance = self.lengths.new()

    def interrupt(self) -> None:
        """Its next rows do not follow those that the modules ran last."""
        self.drafts, self._window = (), None

    def verify(self, most: int) -> tuple[int, ...]:
        """The drafts to run behind its last token, `most` of them; they are used up."""
        drafts, self.drafts = self.drafts[: max(0, most)], ()
        self._num_verified = len(drafts)
        return drafts

    def ask(
        self,
        rows: range,
        *,
        length: int,
        num_to_come: int,
        most: int,
        num_modules: int,
        next_ids: tuple[int, ...],
        block_size: int,
    ) -> Drafting | None:
        """What the modules do with a step's `rows`: positions of tokens, and drafts behind them.

        `length` are the tokens known, of which the rows may be a part of the prompt's, and
        `num_to_come` those that the completion may still gain; `most` drafts have room.
        """
        # One token comes in this step at least, and in the next one behind the drafts too.
        num_drafts = min(self.lengths.of(self.acceptance), num_to_come - 2, most)
        if num_drafts <= 0:
            self._window = None
            return None
        if self._window is None:
            first = max(rows.start, length - PROMPT_WINDOW - block_size + 1)
            self._window = -(-first // block_size) * block_size
        if self._window >= rows.stop:
            return None
        if rows.stop < length:
            return Drafting(
                first_position=self._window,
                num_drafts=0,
                num_passes=num_modules,
                next_ids=next_ids,
            )
        return Drafting(
            first_position=self._window,
            num_drafts=num_drafts,
            num_passes=max(num_drafts, num_modules),
        )

    def judge(self, num_accepted: int, counts: DraftCounts) -> None:
        """So many of the step's drafts came true."""
        if self._num_verified:
            self.lengths.judge(self.acceptance, self._num_verified, num_accepted)
            counts.add(self._num_verified, num_accepted)
            self._num_verified = 0
