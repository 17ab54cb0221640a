import math

import pytest
import torch

from dualray.inference.plan import Adjustment, SampleSpec
from dualray.inference.sampler import sample, uniform


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


def test_uniform_is_uniform():
    values = [uniform(7, i) for i in range(4000)]
    assert all(0 <= v < 1 for v in values)
    # The mean of 4000 uniform numbers has standard deviation 0.0046.
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    assert len(set(values)) == 4000


def test_frequencies_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 4000
    drawn = tokens(probs.log().expand(count, -1), [spec(position=i) for i in range(count)])
    for token, p in enumerate(probs.tolist()):
        # Four standard deviations of a binomial share.
        tolerance = 4 * math.sqrt(p * (1 - p) / count)
        assert drawn.count(token) / count == pytest.approx(p, abs=tolerance)


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


def test_nan_comes_back_as_nan():
    logits = torch.tensor([[0.0, float("nan")], [1.0, 0.0]])
    bad, good = sample(logits, [("a", spec()), ("b", spec(temperature=0.0))])
    assert math.isnan(bad.logprob)
    assert good.token_id == 0
