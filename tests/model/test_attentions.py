"""The attentions MLA is compared with: against plain attention, and served as trained."""

import math

import pytest
import torch
from support.models import (
    attention_changes,
    random_batch,
    tiny_config,
    training_context,
    whole_model,
)

from dualray.errors import ConfigError
from dualray.inference.plan import SampleSpec, SequencePlan
from dualray.inference.stage_runner import StageRunner
from dualray.model.attention import HeadsQuery
from dualray.model.config import ATTENTIONS
from dualray.model.init import logical_tensors
from dualray.model.moe import LocalDispatch

KINDS = list(ATTENTIONS)


class PlainAttention:
    """The definition: every query head against its key head, one sequence and row at a time."""

    def attend(self, query, ctx):
        q, k, v = query.expand(ctx)
        share = q.shape[1] // k.shape[1]
        out, start = [], 0
        for length in ctx.seq_lens:
            for row in range(start, start + length):
                heads = []
                for head in range(q.shape[1]):
                    keys, values = (t[start : row + 1, head // share] for t in (k, v))
                    weights = (keys @ q[row, head] * query.softmax_scale).softmax(0)
                    heads.append(weights @ values)
                out.append(torch.stack(heads))
            start += length
        return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_training_attention_equals_its_definition(kind, bias):
    changes = attention_changes(kind) | {"attention_bias": bias}
    config = tiny_config(num_nextn_predict_layers=0, **changes)
    stage = whole_model(config, dtype=torch.float64)
    ids, _ = random_batch(config, 1, 16)
    grads, outs = [], []
    for attention in (None, PlainAttention()):
        stage.zero_grad()
        ctx = training_context(config, (5, 5, 6))
        ctx.attention = attention or ctx.attention
        out = stage.logits(stage(stage.embed(ids.flatten(), ctx), ctx), ctx)
        out.square().mean().backward()
        outs.append(out.detach())
        grads.append({name: p.grad for name, p in stage.named_parameters()})
    torch.testing.assert_close(*outs, atol=1e-10, rtol=1e-10)
    for name, grad in grads[0].items():
        # 1e-9 by the norm: the same sums in another order, in float64.
        assert (grad - grads[1][name]).norm() <= 1e-9 * grads[1][name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_serving_gives_the_logits_of_training(kind):
    config = tiny_config(num_nextn_predict_layers=0, **attention_changes(kind))
    stage = whole_model(config, dtype=torch.float64)
    ids, _ = random_batch(config, 1, 13)
    ctx = training_context(config, (13,))
    with torch.no_grad():
        expected = stage.logits(stage(stage.embed(ids.flatten(), ctx), ctx), ctx)
    dispatch = LocalDispatch(config.n_routed_experts)
    runner = StageRunner(stage, dispatch, num_blocks=4, block_size=4)
    got = []
    for first, stop in ((0, 6), (6, 7), (7, 12), (12, 13)):
        spec = SampleSpec(position=stop, seed=0, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0,
                          logprobs=None)  # fmt: skip
        plan = SequencePlan(
            request_id="a",
            ids=tuple(ids[0, first:stop].tolist()),
            first_position=first,
            block_table=(2, 0, 3, 1),
            samples=(spec,),
        )
        (sampled,) = runner.run([plan], None).sampled
        row = expected[stop - 1].log_softmax(-1)
        got.append((sampled.token_id, row.argmax().item()))
        assert math.isclose(sampled.logprob, row.max().item(), abs_tol=1e-9)
    assert all(token == best for token, best in got)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_sequences_takes_part(kind):
    """Its peers wait for it in every exchange, so it runs its layers on no token."""
    config = tiny_config(num_nextn_predict_layers=0, **attention_changes(kind))
    dispatch = LocalDispatch(config.n_routed_experts)
    runner = StageRunner(whole_model(config), dispatch, num_blocks=1, block_size=4)
    out = runner.run([], None)
    assert (tuple(out.hidden_TD.shape), out.sampled) == ((0, config.hidden_size), [])


def test_cached_values_a_token():
    def cached(kind):
        return tiny_config(**attention_changes(kind)).cache_dim

    # 4 heads of 16 + 12 values; two, one, and the latent with its rotary key.
    assert [cached(kind) for kind in ("mha", "gqa", "mqa", "mla")] == [112, 56, 28, 18]


def test_projections_of_one_input_are_one_product_under_their_own_names():
    config = tiny_config(attention_bias=True, **attention_changes("gqa"))
    names = [n for n in logical_tensors(whole_model(config)) if "layers.0.self_attn" in n]
    assert [n.removeprefix("model.layers.0.self_attn.") for n in names] == [
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias",
        "v_proj.bias", "o_proj.weight", "o_proj.bias",
    ]  # fmt: skip


def test_query_heads_that_share_a_key_are_neighbours():
    q, k = torch.zeros(1, 4, 2), torch.arange(4.0).view(1, 2, 2)
    query = HeadsQuery(layer=0, q_THd=q, k_TGd=k, v_TGV=k, softmax_scale=1.0)
    rows = query.cache_rows()
    assert query.cache_keys(rows).tolist() == k.tolist()
    assert query.cache_values(rows).tolist() == k.tolist()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"attention": "flash"},
            "model.attention is 'flash' and must be one of mla, mha, gqa, mqa",
        ),
        ({"attention": "mha"}, "model.q_lora_rank is 16 and model.attention mha has no latent"),
        (
            {"kv_lora_rank": None},
            "model.kv_lora_rank is missing, and model.attention mla compresses keys and values",
        ),
        ({"qk_nope_head_dim": 0}, "model.qk_nope_head_dim is 0 and must be at least 1"),
        (
            {"num_key_value_heads": 2},
            "model.num_key_value_heads is 2 and model.attention is mla, but only gqa has a choice "
            "of them",
        ),
        (
            attention_changes("gqa") | {"num_key_value_heads": None},
            "model.num_key_value_heads is missing, and model.attention gqa shares keys among heads",
        ),
        (
            attention_changes("gqa") | {"num_key_value_heads": 3},
            "model.num_attention_heads 4 is not divisible by model.num_key_value_heads 3",
        ),
    ],
)
def test_a_wrong_attention_is_one_sentence(changes, sentence):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert error.value.sentence == sentence
