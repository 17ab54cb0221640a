"""Few rows take few threads, and whoever computes next has all of them again."""

import pytest
import torch

from dualray.inference.step_threads import ROWS_PER_THREAD, step_threads, threads_for


@pytest.mark.parametrize(
    ("rows", "available", "threads"),
    [
        (0, 4, 1),
        (1, 1, 1),
        (ROWS_PER_THREAD, 4, 1),
        (2 * ROWS_PER_THREAD, 4, 2),
        (100 * ROWS_PER_THREAD, 4, 4),
        (100 * ROWS_PER_THREAD, 1, 1),
    ],
)
def test_threads_grow_with_rows(rows, available, threads):
    assert threads_for(rows, available) == threads


def fail_in_a_step(seen: list[int]) -> None:
    with step_threads(1, 2):
        seen.append(torch.get_num_threads())
        raise ValueError("step")


def test_all_threads_are_back_after_a_step_that_fails():
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="step"):
            fail_in_a_step(seen)
        with step_threads(2 * ROWS_PER_THREAD, 2):
            seen.append(torch.get_num_threads())
        assert seen == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
