"""Torch threads of a step on a CPU: few for few rows.

A step that decodes is hundreds of small operations. Two threads have to meet at the end of each,
and while they wait they burn what the engine and its streams need. 16 sequences of the demo model
took 7.4 ms a step with two threads and 6.2 with one on two cores of an AMD EPYC, and 13 against 7
with a server around it; a prompt's 2048 rows took 96 ms with two and 112 with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ROWS_PER_THREAD = 128
"""Rows that make another thread worth its while."""


def threads_for(num_rows: int, available: int) -> int:
    """At least one, at most `available`."""
    return max(1, min(available, num_rows // ROWS_PER_THREAD))


@contextmanager
def step_threads(num_rows: int, available: int) -> Iterator[None]:
    """Lets torch compute with as many threads as `num_rows` rows are worth; with `available` ones
    again behind it."""
    wanted = threads_for(num_rows, available)
    if wanted == available:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(available)
