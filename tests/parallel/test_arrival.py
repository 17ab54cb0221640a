"""Places of rows that arrive in runs, against a stable sort of them."""

from __future__ import annotations

import pytest
import torch

from dualray.kernels.permute import sort_by_key
from dualray.parallel.arrival import into_slots

RANKS, SLOTS = 5, 3


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("most", [0, 1, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_places_are_those_of_a_sort(seed, most, multiple) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (RANKS, SLOTS), generator=generator)
    # As they come from the sources themselves, and in any other order.
    for runs in (torch.arange(RANKS * SLOTS), torch.randperm(RANKS * SLOTS, generator=generator)):
        cells = torch.repeat_interleave(runs, counts.flatten()[runs])
        source, slot = cells // SLOTS, cells % SLOTS
        order, inverse, rows = into_slots(counts, runs, len(cells), multiple)
        by_source = torch.argsort(source, stable=True)
        sorted_order, _, sorted_rows = sort_by_key(slot[by_source], SLOTS, multiple)
        assert torch.equal(rows, sorted_rows)
        expected = by_source[sorted_order.clamp(min=0)] if len(cells) else sorted_order
        assert torch.equal(order, expected.where(sorted_order >= 0, -1))
        assert torch.equal(order[inverse], torch.arange(len(cells)))
