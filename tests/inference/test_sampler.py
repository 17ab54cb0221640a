import math

import pytest
import torch

from dualray.inference.plan import Adjustment, SampleSpec
from dualray.inference.sampler import choose, sample


def spec(**changes) -> SampleSpec:
    values = {
        "position": 3,
        "seed": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "logprobs": None,
    }
    return SampleSpec(**(values | changes))


def tokens(logits, specs) -> list[int]:
    return [s.token_id for s in sample(logits, [(str(i), x) for i, x in enumerate(specs)])]


def draws(logits_V, count=400, **changes) -> set[int]:
    """Tokens drawn over many positions."""
    specs = [spec(position=i, **changes) for i in range(count)]
    return set(tokens(logits_V.expand(count, -1), specs))


def test_zero_temperature_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert tokens(logits, [spec(temperature=0.0, top_p=0.5)]) == [1]


def test_a_request_draws_the_same_whoever_shares_its_batch():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    specs = [spec(seed=i, temperature=0.7 + i / 10, top_k=i) for i in range(6)]
    alone = [tokens(logits[i : i + 1], [specs[i]])[0] for i in range(6)]
    assert tokens(logits, specs) == alone
    mixed = [0, 5, 2]
    others = [specs[0], spec(temperature=0.0), specs[2]]
    assert tokens(logits[mixed], others)[::2] == [alone[0], alone[2]]


def test_any_whole_top_k_is_taken():
    # JSON's numbers have no bound; one request must not fail the step that others share.
    assert draws(torch.zeros(3), top_k=10**400) == {0, 1, 2}


def test_seed_and_position_both_matter():
    logits = torch.zeros(1, 1000)
    base = tokens(logits, [spec()])
    assert tokens(logits, [spec()]) == base
    assert tokens(logits, [spec(seed=2)]) != base
    assert tokens(logits, [spec(position=4)]) != base


def chi_square(counts: list[int], probs: list[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probs))


# With 99 degrees of freedom 148.2 is passed in 1 of 1000 draws; seeds are fixed, so always or
# never. Temperatures and cuts leave a known distribution, which a twin computes by hand.
@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, 100), ({"temperature": 0.7}, 100), ({"top_k": 60}, 60), ({"min_p": 0.05}, None)],
)
def test_frequencies_follow_the_probabilities(changes, kept):
    torch.manual_seed(1)
    logits = torch.randn(100, dtype=torch.float64).sort(descending=True).values
    probs = torch.softmax(logits / changes.get("temperature", 1.0), -1)
    kept = int((probs >= changes.get("min_p", 0) * probs[0]).sum()) if kept is None else kept
    expected = probs[:kept] / probs[:kept].sum()
    count = 40_000
    specs = [spec(seed=i % 40, position=i // 40, **changes) for i in range(count)]
    drawn = torch.tensor(tokens(logits.expand(count, -1), specs)).bincount(minlength=100)
    assert drawn[kept:].sum() == 0
    assert chi_square(drawn[:kept].tolist(), expected.tolist()) < 148.2


def test_equal_noise_makes_close_distributions_agree():
    """The bound (1 - TV) / (1 + TV) holds for every pair (arXiv 2408.07978, theorem 1)."""
    torch.manual_seed(2)
    logits = torch.randn(50, dtype=torch.float64)
    count = 4000
    specs = [spec(position=i) for i in range(count)]
    mine = tokens(logits.expand(count, -1), specs)
    for nearness in (0.1, 0.5, 2.0):
        other = logits + nearness * torch.randn(50, dtype=torch.float64)
        gap = (torch.softmax(logits, -1) - torch.softmax(other, -1)).abs().sum().item() / 2
        drafted = tokens(other.expand(count, -1), specs)
        share = sum(map(int.__eq__, mine, drafted)) / count
        # Three standard deviations of a share of 4000.
        assert (1 - gap) / (1 + gap) - 0.024 < share < 1 - gap + 0.024


def test_cuts_keep_what_they_should():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert draws(logits) == {0, 1, 2, 3}
    assert draws(logits, top_k=2) == {0, 1}
    assert draws(logits, top_p=0.65) == {0, 1}
    assert draws(logits, top_p=0.75) == {0, 1, 2}
    assert draws(logits, top_p=1e-9) == {0}
    assert draws(logits, min_p=0.6) == {0, 1}
    # top_p counts what top_k left: 0.4 of 0.7 is 0.57.
    assert draws(logits, top_k=2, top_p=0.55) == {0}


def test_banned_ids_are_never_chosen_and_keep_their_logprob():
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert draws(logits, adjust=Adjustment(banned_ids=(0,))) == {1, 2}
    ban = Adjustment(banned_ids=(0,))
    (chosen,) = sample(logits[None], [("a", spec(temperature=0.0, adjust=ban, logprobs=1))])
    assert (chosen.token_id, chosen.rank) == (1, 2)
    assert chosen.top[0] == (0, pytest.approx(torch.log_softmax(logits, 0)[0].item()))


def test_a_tiny_temperature_is_greedy_and_finite():
    assert draws(torch.tensor([1.0, 1.0 + 1e-3, 0.0]), temperature=1e-300, count=5) == {1}


def test_logprobs_are_of_the_logits_as_they_are():
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    (chosen,) = sample(logits, [("a", spec(temperature=0.1, logprobs=2))])
    expected = torch.log_softmax(logits[0], 0)
    assert chosen.logprob == pytest.approx(expected[chosen.token_id].item(), abs=1e-15)
    assert [i for i, _ in chosen.top] == [2, 1]


def test_rows_with_cuts_and_without_draw_as_they_would_alone():
    torch.manual_seed(0)
    logits = torch.randn(4, 40, dtype=torch.float64)
    specs = [spec(seed=1), spec(seed=2, top_p=0.5), spec(seed=3, temperature=0.0), spec(top_k=3)]
    together = choose(logits, specs).tolist()
    assert together == [choose(logits[i : i + 1], [s]).item() for i, s in enumerate(specs)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_any_row_gives_a_valid_id(temperature, cuts):
    logits = torch.full((1, 5), float("nan"))
    assert 0 <= choose(logits, [spec(temperature=temperature, **cuts)]).item() < 5


def test_nan_comes_back_as_nan():
    logits = torch.tensor([[0.0, float("nan")], [1.0, 0.0]])
    bad, good = sample(logits, [("a", spec()), ("b", spec(temperature=0.0))])
    assert math.isnan(bad.logprob)
    assert good.token_id == 0
