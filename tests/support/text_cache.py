"""A model that only reads its cache: whoever reads a wrong row says a wrong word.

Each row stands for all tokens up to its own, and is made of the row before it, as a table of
blocks says where that lies. A token follows from its row, its position and the request's seed,
so that `completion` can tell without any cache what a request has to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualray.inference.plan import Owner, Sampled, SequencePlan, StepPlan

Row = int


class TextCache:
    """Runs plans, and asserts that nobody's rows are overwritten while others need them."""

    def __init__(self, block_size: int, vocab_size: int = 6) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._rows: dict[tuple[Owner, int], Row] = {}

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Row by row in the plan's order: a sequence may read what an earlier one has written."""
        sampled = []
        for owner, sequences in plan.owners.items():
            self._check_writes(sequences)
            for sequence in sequences:
                row = self._read(owner, sequence, sequence.first_position - 1)
                for at, token in enumerate(sequence.ids, sequence.first_position):
                    row = _next_row(row, token)
                    self._rows[owner, self._slot(sequence, at)] = row
                for spec in sequence.samples:
                    token = _choose(row, spec.seed, spec.position, self._vocab_size)
                    sampled.append(
                        Sampled(
                            request_id=sequence.request_id, token_id=token, logprob=-1.0, rank=1
                        )
                    )
        return sampled

    def completion(self, prompt: Sequence[int], seed: int, num_tokens: int) -> list[int]:
        """What a request says, computed without a cache."""
        row, ids = 0, list(prompt)
        for token in prompt:
            row = _next_row(row, token)
        while len(ids) < len(prompt) + num_tokens:
            ids.append(_choose(row, seed, len(ids), self._vocab_size))
            row = _next_row(row, ids[-1])
        return ids[len(prompt) :]

    def _read(self, owner: Owner, sequence: SequencePlan, at: int) -> Row:
        return 0 if at < 0 else self._rows[owner, self._slot(sequence, at)]

    def _slot(self, sequence: SequencePlan, at: int) -> int:
        block = sequence.block_table[at // self._block_size]
        return block * self._block_size + at % self._block_size

    def _check_writes(self, sequences: Sequence[SequencePlan]) -> None:
        """Only one sequence writes a block, and only those planned after it may read it."""
        read: set[int] = set()
        written: set[int] = set()
        for sequence in sequences:
            stop = sequence.first_position + len(sequence.ids)
            first = sequence.first_position // self._block_size
            last = (stop - 1) // self._block_size
            assert len(sequence.block_table) > last, "rows without a block"
            own = set(sequence.block_table[first : last + 1])
            assert own.isdisjoint(written), "two sequences write one block"
            assert own.isdisjoint(read), "a block that another one reads is written"
            written |= own
            read.update(sequence.block_table)


def _next_row(row: Row, token: int) -> Row:
    return hash((row, token))


def _choose(row: Row, seed: int, position: int, vocab_size: int) -> int:
    return hash((row, seed, position)) % vocab_size
