"""A request's bits are its own: alone, beside others, cut into parts, cached or preempted."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from support.completing import Completed, Completing
from support.models import attention_changes, tiny_config, whole_model

from dualray.errors import ConfigError
from dualray.inference.batch_invariant import ROWS, pad_rows
from dualray.inference.limits import Limits
from dualray.inference.request import Request, SamplingParams
from dualray.model.config import ATTENTIONS

# Wide enough for products to round differently by their number of rows.
WIDE = {"vocab_size": 257, "hidden_size": 64, "moe_intermediate_size": 32, "qk_nope_head_dim": 16}
PROMPT = tuple(range(3, 40))
ROOMY = Limits(
    num_blocks=64, block_size=8, max_batch=8, max_context=96, max_step_tokens=64, prefix_cache=False
)
# Prompts in odd parts, and too few blocks for all.
TIGHT = Limits(num_blocks=18, block_size=8, max_batch=6, max_context=96, max_step_tokens=11)
KINDS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 5},
    "scored": {"temperature": 1.0, "prompt_logprobs": 2, "seed": 6},
}


def subject(kind: str) -> Request:
    params = SamplingParams(max_tokens=24, logprobs=3, **KINDS[kind])
    return Request(request_id="subject", prompt_ids=PROMPT, params=params, seed=params.seed or 0)


def companions(seed: int) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for i in range(9):
        # Some begin as the subject does, so that they share its blocks.
        start = PROMPT[: rng.choice((0, 0, 17, 33))]
        prompt = (*start, *(rng.randrange(256) for _ in range(rng.randrange(1, 30))))
        params = SamplingParams(
            max_tokens=rng.randrange(1, 30), temperature=rng.choice((0.0, 1.0)), logprobs=1
        )
        made.append(
            Request(request_id=f"c{i}", prompt_ids=prompt, params=params, seed=rng.randrange(99))
        )
    return made


def alone(stage, kind: str, *, invariant: bool) -> Completed:
    return Completing(stage, ROOMY, invariant=invariant).run([subject(kind)])["subject"]


def crowded(stage, kind: str, seed: int, *, invariant: bool):
    others = companions(seed)
    rng = random.Random(seed)
    arrivals = {r.request_id: rng.randrange(12) for r in others} | {"subject": 3}
    model = Completing(stage, TIGHT, invariant=invariant)
    return model.run([*others, subject(kind)], arrivals)["subject"], model.counts


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, "greedy"),
        (torch.float32, "drawn"),
        (torch.float32, "scored"),
        (torch.bfloat16, "scored"),
    ],
)
def test_companions_do_not_change_a_bit(dtype, kind):
    stage = whole_model(tiny_config(**WIDE, num_nextn_predict_layers=0), dtype=dtype)
    expected = alone(stage, kind, invariant=True)
    assert (expected.scored != []) == (kind == "scored")
    preempted = reused = 0
    for seed in range(2):
        got, counts = crowded(stage, kind, seed, invariant=True)
        assert got == expected
        preempted += counts.num_preemptions
        reused += counts.prefix_hits
    assert preempted > 0
    assert reused > 0


@pytest.mark.parametrize("attention", [a for a in ATTENTIONS if a != "mla"])
def test_other_attentions_too(attention):
    config = tiny_config(**WIDE, **attention_changes(attention), num_nextn_predict_layers=0)
    stage = whole_model(config)
    got, _ = crowded(stage, "scored", 0, invariant=True)
    assert got == alone(stage, "scored", invariant=True)


def test_drafts_do_not_change_a_bit():
    stage = whole_model(tiny_config(**WIDE))
    drafting = dataclasses.replace(TIGHT, draft_tokens=3, draft_modules=2)
    # Likely tokens, so that drafts come true at times.
    params = SamplingParams(
        max_tokens=24, temperature=0.0, logprobs=1, logit_bias=((7, 90.0), (9, 90.0))
    )
    wanted = Request(request_id="subject", prompt_ids=PROMPT, params=params, seed=0)
    expected = Completing(stage, ROOMY, invariant=True).run([wanted])["subject"]
    model = Completing(stage, drafting, invariant=True)
    got = model.run([*companions(1), wanted])["subject"]
    assert model.counts.drafts.num_accepted_tokens > 0
    assert [dataclasses.replace(t, draft_ids=()) for t in got.sampled] == expected.sampled


def test_without_the_mode_they_do():
    stage = whole_model(tiny_config(**WIDE, num_nextn_predict_layers=0))
    expected = alone(stage, "scored", invariant=False)
    got, _ = crowded(stage, "scored", 0, invariant=False)
    assert got != expected
    # Close, of course: what differs is rounding.
    assert [t.logprob for t in got.scored] == pytest.approx(
        [t.logprob for t in expected.scored], abs=1e-4
    )


@pytest.mark.parametrize("width", [24, 64, 257])
def test_what_padding_is_for(width):
    """A row's product depends on how many rows there are, and from 16 on no more by sixteens."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, 64), torch.randn(width, 64)

    def first(count: int) -> torch.Tensor:
        return F.linear(pad_rows(x[:count]), weight)[0]

    assert any(not torch.equal(F.linear(x[:n], weight)[0], first(1)) for n in range(1, 16))
    assert all(torch.equal(first(n), first(1)) for n in (1, 2, 15, 16, 17, 33, 100, 200))
    assert len(pad_rows(x[:17])) == 2 * ROWS
    assert len(pad_rows(x[:0])) == 0


def test_other_devices_are_refused():
    stage = whole_model(tiny_config()).to("meta")
    with pytest.raises(ConfigError) as raised:
        Completing(stage, ROOMY, invariant=True)
    assert str(raised.value) == (
        "serve.batch_invariant is true and the workers compute on meta, where products of other "
        "numbers of rows come from other kernels; leave serve.batch_invariant out, or serve on "
        "CPUs."
    )
