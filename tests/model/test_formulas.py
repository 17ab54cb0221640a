"""Parameters against the model on the meta device, FLOPs against torch's counter of a real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from support.configs import configs
from support.models import forward_losses, random_batch, tiny_config, training_context, whole_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualray.model import formulas
from dualray.model.attention import LatentQuery
from dualray.model.config import ATTENTIONS, ModelConfig
from dualray.model.context import AttentionQuery, ForwardContext
from dualray.model.count import count_parameters, count_parts
from dualray.platform.preset import load_preset, preset_names
from dualray.platform.run_file import parse_run_file


def preset(name: str) -> ModelConfig:
    train = {"steps": 1, "seq_len": 16}
    values = {"name": "t", "model": name, "data": {"path": "d"}, "train": train}
    return parse_run_file(values).model


@settings(deadline=None, max_examples=40)
@given(config=configs())
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    counted = count_parts(config)
    parts = (formulas.main_parameters(config), formulas.mtp_parameters(config))
    assert [{k: v for k, v in part.items() if v} for part in parts] == [counted.main, counted.mtp]
    assert formulas.parameter_count(config) == count_parameters(config)


@settings(deadline=None, max_examples=15)
@given(config=configs())
def test_active_parameters_are_those_that_a_token_reaches(config: ModelConfig) -> None:
    """A zero gradient counts (one key has a weight of 1 whatever the query), a missing one not."""
    stage = whole_model(config, dtype=torch.float64)
    ctx = training_context(config, (1,))
    ids = torch.tensor([5])
    stage.logits(stage(stage.embed(ids, ctx), ctx), ctx).square().sum().backward()
    used = 0
    for name, parameter in stage.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if ".experts." in name:
            used += sum(expert.numel() for expert in gradient if expert.any())
        elif name != "embed_tokens.weight" or config.tie_word_embeddings:
            used += gradient.numel()
    assert used == formulas.parameter_count(config).active


class PlainAttention:
    """All keys for every query, as plain products that the counter sees; absorbed on request."""

    def __init__(self, absorbed: bool = False) -> None:
        self._absorbed = absorbed

    def attend(self, query: AttentionQuery, ctx: ForwardContext) -> Tensor:
        if self._absorbed:
            rows = query.cache_rows()
            q, k, v = query.cache_queries(), query.cache_keys(rows), query.cache_values(rows)
            if isinstance(query, LatentQuery):
                # The rotary key comes along for the sake of a kernel and is dropped afterwards.
                v = v[..., : query.latent_TC.shape[1]]
        else:
            q, k, v = query.expand(ctx)
        H = q.shape[1]
        q, k, v = (x.repeat_interleave(H // x.shape[1], dim=1).transpose(0, 1) for x in (q, k, v))
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).transpose(0, 1)
        return query.cache_output(out) if self._absorbed else out


def flops(config: ModelConfig, num_tokens: int, attention: PlainAttention, work: Callable) -> int:
    """What torch counts; the routed experts' weighted sum is no product, and in no formula."""
    # float64 sends the experts through plain products; torch cannot count the grouped ones.
    stage = whole_model(config, dtype=torch.float64)
    ctx = training_context(config, (num_tokens,))
    ctx.attention = attention
    with FlopCounterMode(display=False) as counter:
        work(stage, ctx)
    return counter.get_total_flops()


@pytest.mark.parametrize("absorbed", [False, True])
@settings(deadline=None, max_examples=12)
@given(config=configs())
def test_forward_flops(absorbed: bool, config: ModelConfig) -> None:
    T = 7

    def forward(stage, ctx) -> None:
        ids, _ = random_batch(config, 1, T)
        # With gradients: without them a few tokens go to all experts, which is more work.
        stage.logits(stage(stage.embed(ids.flatten(), ctx), ctx), ctx)

    counted = flops(config, T, PlainAttention(absorbed), forward)
    assert counted == T * formulas.forward_flops(config, T, absorbed=absorbed)


@settings(deadline=None, max_examples=12)
@given(config=configs())
def test_training_flops(config: ModelConfig) -> None:
    T = 6

    def train(stage, ctx) -> None:
        losses = forward_losses(stage, *random_batch(config, 1, T), ctx)
        (losses.main + sum(losses.mtp)).backward()

    counted = flops(config, T, PlainAttention(), train)
    # Without a mask T tokens see T keys each; 2T - 1 causal ones see as many on average.
    assert counted == T * formulas.training_flops(config, 2 * T - 1)


def test_training_flops_without_mtp() -> None:
    config = tiny_config()
    alone = tiny_config(num_nextn_predict_layers=0)
    expected = formulas.training_flops(alone, 64)
    assert formulas.training_flops(config, 64, with_mtp=False) == expected
    assert formulas.training_flops(config, 64) > expected


def test_deepseek_v3_has_its_published_figures() -> None:
    """Report and README_WEIGHTS: 671B, 36.6B without the embedding, MTP 11.5B without the
    matrix in front of its layer; arXiv 2505.09343, tables 1 and 2: 70.272 KB, 250 GFLOPs."""
    config = preset("deepseek-v3")
    parameters = formulas.parameter_count(config)
    assert round(parameters.total / 1e9) == 671
    assert round(parameters.active / 1e9, 1) == 36.6
    mtp = formulas.mtp_parameters(config)
    assert round((parameters.mtp - mtp["projection"]) / 1e9, 1) == 11.5
    assert formulas.cache_bytes_per_token(config) == 70_272
    assert round(formulas.training_flops(config, 4096, with_mtp=False) / 1e9) == 250
    assert formulas.original_context(config) == 4096


def test_the_16b_presets_have_their_published_figures() -> None:
    """arXiv 2502.16982, table 1: 15.29B and 2.24B without the embeddings; 2405.04434: 15.7B."""
    moonlight = preset("moonlight")
    parts = formulas.main_parameters(moonlight)
    parameters = formulas.parameter_count(moonlight)
    inner = parameters.total - parts["embedding"] - parts["head"]
    assert (round(inner / 1e9, 2), round((parameters.active - parts["head"]) / 1e9, 2)) == (
        15.29,
        2.24,
    )
    lite = formulas.parameter_count(preset("deepseek-v2-lite"))
    assert (round(lite.total / 1e9, 1), round(lite.active / 1e9, 1)) == (15.7, 2.5)
    assert formulas.original_context(moonlight) == 8192


@pytest.mark.parametrize("name", preset_names())
def test_presets_name_every_width_and_agree_with_the_meta_device(name: str) -> None:
    config = preset(name)
    assert set(load_preset(name)) >= {"kv_lora_rank", "q_lora_rank", "n_routed_experts"}
    assert formulas.parameter_count(config) == count_parameters(config)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cache_bytes(attention: str) -> None:
    config = tiny_config(
        attention=attention,
        num_attention_heads=4,
        num_key_value_heads=2 if attention == "gqa" else None,
        q_lora_rank=None,
        kv_lora_rank=12 if attention == "mla" else None,
    )
    # 4 layers; keys are 16 wide, values 12, the latent 12 and its rotary key 6.
    values = {"mla": 18, "mha": 4 * 28, "gqa": 2 * 28, "mqa": 28}[attention]
    assert formulas.cache_bytes_per_token(config) == 4 * values * 2
    assert formulas.cache_bytes_per_token(config, 4) == 4 * values * 4
