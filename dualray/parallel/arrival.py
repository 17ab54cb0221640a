"""Where rows that have arrived belong: in their slots, by source rank, and in its order.

R source ranks, s slots of this rank, M rows. Rows arrive as R * s runs, one of each source's rows
for each slot, and how long every run is has been told before: nothing has to be sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def into_slots(
    counts_Rs: Tensor, runs: Tensor, num_rows: int, multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(order, inverse_M, rows int64 per slot) as `sort_by_key` gives them for (slot, source).

    `counts_Rs` int64 rows of each source for each slot, `num_rows` in all; `runs` (R * s,) names
    the flattened cells of `counts_Rs` in the order in which their rows arrive. A slot's rows are
    rounded up to `multiple`, with `order` -1 where a row is padding.
    """
    count_R = counts_Rs.flatten()[runs]
    real_s = counts_Rs.sum(0)
    rows_s = real_s if multiple == 1 else (real_s + multiple - 1) // multiple * multiple
    start_Rs = (rows_s.cumsum(0) - rows_s) + (counts_Rs.cumsum(0) - counts_Rs)
    shift_R = start_Rs.flatten()[runs] - (count_R.cumsum(0) - count_R)
    row_M = torch.arange(num_rows, device=runs.device)
    inverse_M = row_M + torch.repeat_interleave(shift_R, count_R, output_size=num_rows)
    if multiple == 1:
        order = torch.empty_like(inverse_M)
    else:
        order = inverse_M.new_full((int(rows_s.sum()),), -1)
    order[inverse_M] = row_M
    return order, inverse_M, rows_s
