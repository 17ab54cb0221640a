"""MHA, GQA and MQA against transformers' Llama, which is what our dense models of them are
with rotary over the whole head and values as wide as keys.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import random_batch, tiny_config, training_context
from support.parity import gradients, new_stage, their_gradients, worst_gradient, worst_logit
from transformers import LlamaConfig, LlamaForCausalLM

from dualray.model.config import ModelConfig, YarnConfig
from dualray.model.stage import Stage
from dualray.platform.bench.hugging_face import copy_weights

pytestmark = pytest.mark.parity

KINDS = {
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa"},
}
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=8)


def llama_config(config: ModelConfig) -> LlamaConfig:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "yarn"} | vars(config.rope_scaling)
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "attention_bias rms_norm_eps max_position_embeddings tie_word_embeddings"
    ).split()
    return LlamaConfig(
        **{name: getattr(config, name) for name in same},
        num_key_value_heads=config.key_value_heads,
        head_dim=config.qk_head_dim,
        rope_parameters=rope | {"rope_theta": config.rope_theta},
        attn_implementation="eager",
    )


def llama(stage: Stage) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(stage.config))
    tensors = model.state_dict()
    if stage.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    copy_weights(stage, tensors, interleaved=False)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True, "tie_word_embeddings": True}, {"rope_scaling": YARN}],
    ids=["plain", "bias-tied", "yarn"],
)
def test_llama(kind: str, changes: dict[str, Any]) -> None:
    config = tiny_config(
        q_lora_rank=None,
        kv_lora_rank=None,
        num_attention_heads=4,
        qk_nope_head_dim=0,
        qk_rope_head_dim=10,
        v_head_dim=10,
        num_hidden_layers=3,
        first_k_dense_replace=3,
        num_nextn_predict_layers=0,
        **KINDS[kind],
        **changes,
    )
    stage = new_stage(config, torch.float32, seed=0)
    model = llama(stage)
    ids, (labels,) = random_batch(config, 2, 33)
    ctx = training_context(config, (33, 33))
    ours = stage.logits(stage(stage.embed(ids.flatten(), ctx), ctx), ctx)
    theirs = model(ids, use_cache=False).logits.flatten(0, 1)
    assert worst_logit(ours, theirs) < 1e-5
    losses = [F.cross_entropy(logits, labels.flatten()) for logits in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert (losses[0] - losses[1]).abs() <= 1e-6 * losses[1]
    expected = their_gradients(model.named_parameters(), config, interleaved=False)
    assert worst_gradient(gradients(stage), expected) < 1e-5
