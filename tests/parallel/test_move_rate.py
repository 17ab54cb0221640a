"""What migrations took, divided into a fixed part and a part for every byte."""

from __future__ import annotations

import pickle

import pytest

from dualray.parallel.move_rate import KEPT, MoveRate

LINK = 1e9


def after(*migrations: tuple[float, float]) -> MoveRate:
    rate = MoveRate(LINK)
    for num_bytes, seconds in migrations:
        rate.observe(num_bytes, seconds)
    return rate


def foreseen(rate: MoveRate, num_bytes: float) -> float:
    overhead_s, bytes_per_s = rate.fit()
    return overhead_s + num_bytes / bytes_per_s


def test_the_configured_rate_counts_until_something_moved() -> None:
    assert after().fit() == (0.0, LINK)
    assert after((100, 0.0)).fit() == (0.0, LINK)  # a clock that did not advance


def test_one_small_migration_does_not_make_a_large_one_dear() -> None:
    rate = after((25e6, 2.0))
    assert rate.fit() == (pytest.approx(1.975), LINK)
    # 1.1 GB were foreseen to take 1.1 s; at 25 MB in 2 s they would take 88 s.
    assert foreseen(rate, 1.1e9) == pytest.approx(1.1 + 1.975)


def test_a_link_that_is_faster_than_configured_is_believed() -> None:
    assert after((4e9, 1.0)).fit() == (0.0, 4e9)


def test_what_bytes_take_is_found_where_they_differ() -> None:
    migrations = [(size, 1.5 + size / 5e7) for size in (1e6, 4e8, 2e8)]
    assert after(*migrations).fit() == (pytest.approx(1.5), pytest.approx(5e7))


def test_equally_large_migrations_say_only_their_mean() -> None:
    assert after((1e8, 1.0), (1.01e8, 3.0)).fit() == (pytest.approx(2.0 - 0.1005), LINK)
    assert after((0, 1.0), (0, 2.0)).fit() == (1.5, LINK)


def test_neither_part_is_negative() -> None:
    # A line through these has a negative overhead, or a negative rate.
    overhead_s, bytes_per_s = after((1e8, 0.1), (2e8, 3.0)).fit()
    assert overhead_s == 0.0
    assert bytes_per_s == pytest.approx((1e16 + 4e16) / (1e7 + 6e8))
    assert after((1e8, 3.0), (3e8, 1.0)).fit() == (pytest.approx(2.0 - 0.2), LINK)


def test_old_migrations_are_forgotten() -> None:
    rate = after((1e9, 500.0), *[(25e6, 2.0)] * KEPT)
    assert rate.fit() == after((25e6, 2.0)).fit()
    assert pickle.loads(pickle.dumps(rate)).fit() == rate.fit()
