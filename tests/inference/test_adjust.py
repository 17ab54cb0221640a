"""Bias and penalties against loops over every logit, and what they do to whole completions."""

import math
import pickle
import random

import pytest
import torch

from dualray.inference.adjust import adjust
from dualray.inference.plan import Adjustment, SampleSpec
from dualray.inference.request import SamplingParams
from dualray.inference.sampler import sample
from dualray.inference.token_history import TokenHistory

V = 23
# One rounding per operation, of which a logit sees five.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def slow(logits_V: list[float], params: SamplingParams, prompt, output, banned) -> list[float]:
    """vLLM's rules, a logit at a time, from the tokens themselves."""
    new = []
    for token, logit in enumerate(logits_V):
        for biased, bias in params.logit_bias:
            if biased == token:
                logit += bias
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * output.count(token)
        logit -= params.presence_penalty * (token in output)
        new.append(-math.inf if token in banned else logit)
    return new


def adjustment(params: SamplingParams, prompt, output, banned=()) -> Adjustment | None:
    history = TokenHistory(params, prompt)
    for token in output:
        history.add(token)
    return history.adjustment(tuple(banned))


def random_case(rng: random.Random):
    """Parameters, prompt, output and banned ids; each parameter is neutral at times."""

    def maybe(value, neutral):
        return value if rng.random() < 0.6 else neutral

    biased = rng.sample(range(V), rng.randrange(6))
    params = SamplingParams(
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.01, 2), 1.0),
        logit_bias=tuple((i, maybe(rng.uniform(-100, 100), 0.0)) for i in biased),
    )
    prompt = [rng.randrange(V) for _ in range(rng.randrange(1, 12))]
    output = [rng.randrange(V) for _ in range(rng.randrange(12))]
    return params, prompt, output, maybe(rng.sample(range(V), 2), [])


def spec(change: Adjustment | None, **values) -> SampleSpec:
    given = {
        "position": 3,
        "seed": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "logprobs": None,
    }
    return SampleSpec(**(given | values), adjust=change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_equal_loops_over_every_logit(dtype):
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(60):
        logits = torch.randn(5, V, dtype=dtype) * 4
        cases = [random_case(rng) for _ in range(5)]
        expected = [slow(row, *case) for row, case in zip(logits.tolist(), cases)]
        made = [(row, adjustment(*case)) for row, case in enumerate(cases)]
        adjust(logits, [(row, a) for row, a in made if a is not None])
        # Relative: a repetition penalty of 0.01 makes large numbers.
        torch.testing.assert_close(
            logits,
            torch.tensor(expected, dtype=dtype),
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * 100,
        )


def test_greedy_takes_the_likeliest_after_adjusting():
    rng = random.Random(1)
    torch.manual_seed(1)
    logits = torch.randn(200, V, dtype=torch.float64) * 3
    cases = [random_case(rng) for _ in range(200)]
    expected = [slow(row, *case) for row, case in zip(logits.tolist(), cases)]
    specs = [spec(adjustment(*case), temperature=0.0) for case in cases]
    chosen = sample(logits, [(str(i), s) for i, s in enumerate(specs)])
    assert [c.token_id for c in chosen] == [row.index(max(row)) for row in expected]
    plain = logits.argmax(dim=-1).tolist()
    assert [c.token_id for c in chosen] != plain


def test_frequencies_follow_the_adjusted_probabilities():
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5])
    params = SamplingParams(
        repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((3, 1.0),)
    )
    prompt, output = [2, 0], [0, 0, 3]
    probs = torch.tensor(slow(logits.tolist(), params, prompt, output, [])).softmax(0).tolist()
    change = adjustment(params, prompt, output)
    count = 4000
    rows = [(str(i), spec(change, position=i)) for i in range(count)]
    drawn = [s.token_id for s in sample(logits.expand(count, -1), rows)]
    for token, p in enumerate(probs):
        # Four standard deviations of a binomial share.
        tolerance = 4 * math.sqrt(p * (1 - p) / count)
        assert drawn.count(token) / count == pytest.approx(p, abs=tolerance)


def test_cuts_come_after():
    logits = torch.tensor([3.0, 2.0, 1.0])
    change = adjustment(SamplingParams(logit_bias=((0, -100.0),)), [1], [])
    rows = [(str(i), spec(change, position=i, top_k=1)) for i in range(50)]
    assert {s.token_id for s in sample(logits.expand(50, -1), rows)} == {1}


def test_a_request_draws_the_same_whoever_shares_its_batch():
    rng = random.Random(2)
    torch.manual_seed(2)
    logits = torch.randn(12, V) * 3
    changes = [adjustment(*random_case(rng)) for _ in range(11)] + [None]
    specs = [spec(c, seed=i, temperature=0.9) for i, c in enumerate(changes)]
    rows = [(str(i), s) for i, s in enumerate(specs)]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(12)]
    assert sample(logits, rows) == alone
    picked = [11, 4, 7, 0]
    assert sample(logits[picked], [rows[i] for i in picked]) == [alone[i] for i in picked]


def with_drafts(params: SamplingParams, prompt, output, drafts, banned=()):
    """Adjustments of a row and of those behind each draft; and as if all had been chosen."""
    history = TokenHistory(params, prompt)
    for token in output:
        history.add(token)
    later, ahead = [history], history
    for draft in drafts:
        ahead = ahead.after(draft)
        later.append(ahead)
    apart = [
        adjustment(params, prompt, [*output, *drafts[:count]], banned)
        for count in range(len(drafts) + 1)
    ]
    return [each.adjustment(tuple(banned)) for each in later], apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drafts_count_as_if_they_had_been_chosen_to_the_last_bit(dtype):
    rng = random.Random(3)
    torch.manual_seed(3)
    shared, apart = [], []
    for _ in range(40):
        params, prompt, output, banned = random_case(rng)
        drafts = [rng.randrange(V) for _ in range(rng.randrange(1, 7))]
        both = with_drafts(params, prompt, output, drafts, banned)
        for one, other in zip(*both, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                shared.append(one)
                apart.append(other)
    assert sum(bool(change.draft_ids) for change in shared) > 40
    assert not any(change.draft_ids for change in apart)
    logits = torch.randn(len(shared), V, dtype=dtype) * 3
    ours, expected = logits.clone(), logits.clone()
    adjust(ours, list(enumerate(shared)))
    adjust(expected, list(enumerate(apart)))
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, logits)


def test_a_plan_carries_what_was_said_once_whatever_is_drafted():
    params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5)
    changes, _ = with_drafts(params, range(1000), range(1000), [1, 2, 3])
    assert [change.draft_ids for change in changes] == [(), (1,), (1, 2), (1, 2, 3)]
    one, all_rows = (len(pickle.dumps(rows)) for rows in (changes[:1], changes))
    assert all_rows < one + 1000
    again = pickle.loads(pickle.dumps(changes))
    assert again == changes
    assert all(change.output_counts is again[0].output_counts for change in again)


def test_logprobs_and_ranks_stay_those_of_the_raw_logits():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    change = adjustment(SamplingParams(logit_bias=((2, 50.0),)), [0], [])
    (chosen,) = sample(logits, [("a", spec(change, temperature=0.0, logprobs=3))])
    raw = torch.log_softmax(logits[0], 0).tolist()
    assert (chosen.token_id, chosen.logprob, chosen.rank) == (2, raw[2], 3)
    assert chosen.top == tuple(enumerate(raw))
    assert logits.tolist() == [[2.0, 1.0, 0.0]]


def test_half_precision_logits_are_adjusted_in_float32():
    logits = torch.tensor([[100.0, 99.5]], dtype=torch.bfloat16)
    # bfloat16 has steps of 0.5 here and would lose the bias.
    change = adjustment(SamplingParams(logit_bias=((0, -0.3), (1, 0.3))), [0], [])
    (chosen,) = sample(logits, [("a", spec(change, temperature=0.0))])
    assert chosen.token_id == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_repetition_penalty_makes_no_nan(dtype):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]], dtype=dtype)
    adjust(logits, [(0, Adjustment(repetition_penalty=5e-324, seen_ids=(0, 1, 2)))])
    assert torch.isfinite(logits).all()
    change = Adjustment(repetition_penalty=5e-324, seen_ids=(0,), banned_ids=(3,))
    drawn = sample(logits, [("a", spec(change, temperature=1e-300))])
    assert drawn[0].token_id == 0
