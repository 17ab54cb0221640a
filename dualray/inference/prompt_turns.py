"""How prompts share the tokens of a step that decoding leaves.

The oldest prompt has half of them, and so comes to its end whatever else arrives; the other
half goes to the shortest, so that a short prompt need not wait for a long one that came
before it. What one side does not need the other one has. Equal prompts run two at a time in
the order of their arrival, rather than all of them slowly.
"""

from __future__ import annotations

from collections.abc import Sequence


def prompt_turns(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """(index, most tokens that it may run) in the order in which prompts are to be planned.

    `lengths` are the tokens that each has still to run, oldest first. A later one may run what
    those before it have really left of `budget`, but for the oldest, who comes first.
    """
    if not lengths:
        return []
    others = sorted(range(1, len(lengths)), key=lengths.__getitem__)
    share = max(budget - budget // 2, budget - sum(lengths[1:]))
    return [(0, share), *((index, budget) for index in others)]
