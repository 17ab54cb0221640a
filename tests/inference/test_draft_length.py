"""How long drafts are, against brute force and against a server in numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dualray.inference.draft_length import EXPECTED, Acceptance, DraftLengths, best_length
from dualray.inference.step_costs import StepCosts


class Costs(StepCosts):
    """Known ones."""

    def __init__(self, base: float, row: float, walk: float) -> None:
        super().__init__()
        self.known = base, row, walk

    def seconds(self, rows: int, passes: int) -> float:
        base, row, walk = self.known
        return base + row * rows + walk * passes

    def observe(self, rows: int, passes: int, seconds: float) -> None:
        raise AssertionError("they are known")


def random_gains(rng: random.Random, n: int, most: int) -> list[list[float]]:
    rates = [[rng.random() for _ in range(most)] for _ in range(n)]
    return [Acceptance(own, 0.1).gains() for own in rates]


def speed(lengths: list[int], gains: list[list[float]], costs: StepCosts, lanes: int) -> float:
    tokens = len(gains) + sum(sum(own[:length]) for own, length in zip(gains, lengths))
    rows = len(gains) + sum(lengths)
    return tokens / costs.seconds(rows, max(lengths) * lanes)


def brute_force(gains: list[list[float]], costs: StepCosts, lanes: int) -> float:
    """The best speed over all lengths of all sequences."""
    best = 0.0

    def choose(lengths: list[int]) -> None:
        nonlocal best
        if len(lengths) == len(gains):
            best = max(best, speed(lengths, gains, costs, lanes))
            return
        for length in range(len(gains[0]) + 1):
            choose([*lengths, length])

    choose([])
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_other_lengths_are_faster(seed):
    rng = random.Random(seed)
    n, most, lanes = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 2)
    gains = random_gains(rng, n, most)
    costs = Costs(1.0, rng.choice([0.01, 0.1, 0.5]), rng.choice([0.02, 0.2, 0.6]))
    passes, least = best_length(gains, costs, lanes)
    lengths = [sum(gain >= least for gain in own[:passes]) for own in gains]
    assert speed(lengths, gains, costs, lanes) == pytest.approx(brute_force(gains, costs, lanes))


def chosen(lengths: DraftLengths, requests: list[Acceptance]) -> list[int]:
    lengths.begin_step(requests, 1)
    return [lengths.of(own) for own in requests]


def test_more_sequences_draft_less():
    totals = []
    for count in (1, 4, 16, 64):
        lengths = DraftLengths(4, Costs(1.0, 0.05, 0.2))
        totals.append(sum(chosen(lengths, [lengths.new() for _ in range(count)])) / count)
    assert totals == sorted(totals, reverse=True)
    assert totals[0] >= 2
    assert totals[-1] < 1


def test_each_request_has_the_length_that_its_own_drafts_earn():
    # Only the passes cost: whoever walks them anyway takes what it can get, but rows are not free.
    lengths = DraftLengths(3, Costs(1.0, 0.1, 0.01))
    good, bad = lengths.new(), lengths.new()
    for _ in range(40):
        lengths.judge(good, 3, 3)
        lengths.judge(bad, 3, 0)
    assert chosen(lengths, [good, bad]) == [3, 0]


def test_only_what_was_judged_is_learnt():
    own = Acceptance([0.5, 0.5, 0.5], rate=0.5)
    own.judge(3, 1)
    assert own.rates == [0.75, 0.25, 0.5]  # the third came behind one that was wrong
    own.judge(1, 1)
    assert own.rates == [0.875, 0.25, 0.5]
    assert own.gains() == [0.875, 0.875 * 0.25, 0.875 * 0.25 * 0.5]


def serve(lengths: DraftLengths, rate: float, steps: int, rng: random.Random) -> list[int]:
    """The lengths of one sequence whose drafts come true with probability `rate` each."""
    own = lengths.new()
    taken = []
    for _ in range(steps):
        (length,) = chosen(lengths, [own])
        taken.append(length)
        if length:
            accepted = 0
            while accepted < length and rng.random() < rate:
                accepted += 1
            lengths.judge(own, length, accepted)
    return taken


def fixed_speed(length: int, rate: float, n: int, seconds: Callable[[int, int], float]) -> float:
    """Tokens a second of n sequences whose drafts all have one length."""
    tokens = 1 + sum(rate**place for place in range(1, length + 1))
    return n * tokens / seconds(n * (1 + length), length)


@pytest.mark.parametrize("seed", range(3))
def test_lengths_that_adapt_are_about_as_fast_as_the_best_one(seed):
    """Loads that follow each other, in a server whose rows are cheap up to four. Whoever stops
    drafting cannot draft for some tokens: its window begins with a block."""

    def seconds(rows: int, passes: int) -> float:
        return (3.2 + 0.35 * min(rows, 4) + 0.32 * max(0, rows - 4) + 1.15 * passes) / 1000

    rng = random.Random(seed)
    lengths = DraftLengths(3)
    speeds = []
    for n, rate in ((1, 0.7), (8, 0.7), (1, 0.7), (8, 0.9), (32, 0.7), (2, 0.4), (1, 0.9)):
        requests = [lengths.new() for _ in range(n)]
        pending, closed = [0] * n, [0] * n
        total_s, tokens = 0.0, 0
        for _ in range(600):
            wanted = chosen(lengths, requests)
            for i, length in enumerate(wanted):
                closed[i] = 8 if not length else max(0, closed[i] - 1)
            wanted = [0 if shut else length for length, shut in zip(wanted, closed)]
            step = (n + sum(pending), max(wanted))
            total_s += seconds(*step)
            lengths.costs.observe(*step, seconds(*step) * rng.lognormvariate(0, 0.1))
            for own, length in zip(requests, pending):
                accepted = 0
                while accepted < length and rng.random() < rate:
                    accepted += 1
                tokens += 1 + accepted
                if length:
                    lengths.judge(own, length, accepted)
            pending = wanted
        best = max(fixed_speed(length, rate, n, seconds) for length in range(4))
        speeds.append(tokens / total_s / best)
    assert min(speeds) > 0.85, speeds
    assert sum(speeds) / len(speeds) > 0.95, speeds


def test_drafts_that_do_not_pay_stop_and_are_tried_again_now_and_then():
    rng = random.Random(0)
    lengths = DraftLengths(2, Costs(1.0, 0.1, 0.4))
    taken = serve(lengths, 0.1, 4000, rng)
    assert taken[0] > 0
    late = taken[200:]
    assert 0 < sum(length > 0 for length in late) < 0.1 * len(late)
    # Once they come true they are believed again.
    assert serve(lengths, 0.95, 2000, rng)[-200:].count(0) < 20


def test_drafts_that_pay_go_on():
    lengths = DraftLengths(2, Costs(1.0, 0.05, 0.2))
    taken = serve(lengths, 0.9, 500, random.Random(0))
    assert taken.count(2) > 450
    assert lengths.acceptance[0] == pytest.approx(0.9, abs=0.1)
    assert DraftLengths(2).acceptance == (EXPECTED, EXPECTED)


@pytest.mark.parametrize(
    "known", [(4e-3, 1e-4, 1.2e-3), (4e-3, 1e-3, 1e-3), (3e-3, 5e-5, 4e-3), (5e-2, 3e-3, 8e-3)]
)
def test_costs_are_learnt_from_noisy_steps(known):
    rng = random.Random(1)
    truth, costs = Costs(*known), StepCosts()
    for _ in range(800):
        passes = rng.choice([0, 1, 1, 2])
        rows = rng.choice([1, 4, 8]) * (1 + passes)
        seconds = truth.seconds(rows, passes) * rng.lognormvariate(0, 0.1)
        held_up = 5.0 if rng.random() < 0.02 else 1.0
        costs.observe(rows, passes, seconds * held_up)
    for rows, passes in ((1, 0), (2, 1), (3, 2), (16, 1), (24, 2)):
        # A filter that follows changes keeps some of the noise.
        assert costs.seconds(rows, passes) == pytest.approx(truth.seconds(rows, passes), rel=0.15)


def test_costs_follow_a_change():
    costs = StepCosts()
    for _ in range(200):
        costs.observe(2, 1, 0.005)
    for _ in range(200):
        costs.observe(2, 1, 0.010)
    assert costs.seconds(2, 1) == pytest.approx(0.010, rel=0.1)
    assert all(costs.seconds(*step) > 0 for step in ((1, 0), (1, 1), (64, 0)))


def test_what_cannot_have_been_measured_is_left_out():
    costs = StepCosts()
    costs.observe(1, 0, 0.0)
    costs.observe(1, 0, 0.004)
    costs.observe(1, 0, -1.0)
    assert costs.seconds(1, 0) == pytest.approx(0.004)
