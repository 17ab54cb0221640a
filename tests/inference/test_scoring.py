"""Log-probabilities against transformers and against a plain forward, however they are packed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import tiny_config, training_context, whole_model

from dualray.inference.scoring import packs, score
from dualray.model.config import ATTENTIONS
from dualray.model.stage import Stage
from dualray.platform.bench.hugging_face import new_model

SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7], [1, 8, 2, 8], [96, 0, 96]]


def plain(stage: Stage, sequence: list[int]) -> list[float]:
    """The slow twin: one forward, all logits, all of the softmax."""
    ctx = training_context(stage.config, (len(sequence),))
    ids = torch.tensor(sequence)
    with torch.no_grad():
        logits = stage.logits(stage(stage.embed(ids, ctx), ctx), ctx)
    chances = logits.double().log_softmax(-1)[:-1]
    return chances.gather(1, ids[1:, None]).flatten().tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_against_a_plain_forward(attention: str) -> None:
    config = tiny_config(
        attention=attention,
        num_key_value_heads=1 if attention == "gqa" else None,
        q_lora_rank=None,
        kv_lora_rank=12 if attention == "mla" else None,
    )
    stage = whole_model(config)
    # A budget of 8 tokens makes three packs, one of 200 logits goes two rows at a time.
    scored = score(stage, SEQUENCES, token_budget=8, logits_budget=200)
    assert [len(values) for values in scored] == [7, 0, 1, 3, 2]
    for sequence, values in zip(SEQUENCES, scored):
        assert values == pytest.approx(plain(stage, sequence), abs=1e-5)


def test_against_transformers() -> None:
    config = tiny_config(
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        moe_intermediate_size=16,
        num_nextn_predict_layers=0,
    )
    stage = whole_model(config)
    theirs = new_model(config, stage).eval()
    for sequence, values in zip(SEQUENCES, score(stage, SEQUENCES)):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            chances = theirs(ids).logits[0, :-1].log_softmax(-1)
        expected = chances.gather(1, ids[0, 1:, None]).flatten().tolist()
        assert values == pytest.approx(expected, abs=1e-5)


def test_bf16_is_computed_in_bf16_and_reported_in_fp32() -> None:
    stage = whole_model(tiny_config(), dtype=torch.bfloat16)
    [values] = score(stage, [SEQUENCES[0]])
    # Within a bf16 logit's rounding of the fp32 model, and not on bf16's own grid.
    assert values == pytest.approx(plain(whole_model(tiny_config()), SEQUENCES[0]), abs=0.1)
    assert torch.tensor(values).bfloat16().float().tolist() != values


def test_progress_counts_sequences() -> None:
    done: list[int] = []
    score(whole_model(tiny_config()), SEQUENCES, token_budget=8, on_pack=done.append)
    assert done == [1, 4, 5]


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 12), max_size=12), budget=st.integers(1, 20))
def test_packs_keep_order_and_budget(lengths: list[int], budget: int) -> None:
    sequences = [[index] * length for index, length in enumerate(lengths)]
    made = list(packs(sequences, budget))
    assert [sequence for pack in made for sequence in pack] == sequences
    for pack in made:
        assert len(pack) == 1 or sum(map(len, pack)) <= budget
    for pack, following in itertools.pairwise(made):
        assert sum(map(len, pack)) + len(following[0]) > budget
