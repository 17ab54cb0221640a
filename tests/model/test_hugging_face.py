"""config.json and the rotary layout against transformers'."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from support.models import tiny_config
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig, YarnConfig
from dualray.model.hugging_face import (
    from_hugging_face,
    is_interleaved,
    rotary_rows,
    to_hugging_face,
)
from dualray.model.rope import Rope, softmax_scale

RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""config.json of the released DeepSeek-V3, without `auto_map` and `quantization_config`."""

YARNS = [
    None,
    YarnConfig(factor=4.0, original_max_position_embeddings=16),
    YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale_all_dim=1.0),
    YarnConfig(factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.3),
    YarnConfig(factor=4.0, original_max_position_embeddings=16, mscale=0.7),
    YarnConfig(factor=4.0, original_max_position_embeddings=16, mscale=0.0, mscale_all_dim=0.5),
    YarnConfig(factor=1.0, original_max_position_embeddings=16, mscale=2.0, beta_fast=8.0),
]


def test_the_released_config() -> None:
    model = from_hugging_face(RELEASED)
    assert (model.num_hidden_layers, model.q_lora_rank, model.num_nextn_predict_layers) == (
        61,
        1536,
        1,
    )
    assert model.rope_scaling == YarnConfig(
        factor=40.0, original_max_position_embeddings=4096, mscale_all_dim=1.0
    )
    assert is_interleaved(RELEASED)
    again = to_hugging_face(model, torch.bfloat16)
    not_kept = {
        "aux_loss_alpha", "bos_token_id", "eos_token_id", "ep_size", "seq_aux",
        "transformers_version",
    }  # fmt: skip
    for key in RELEASED.keys() - not_kept - {"rope_scaling"}:
        assert again[key] == RELEASED[key], key
    assert again["rope_scaling"] == RELEASED["rope_scaling"] | {"rope_type": "yarn"}


@pytest.mark.parametrize(
    "changes",
    [
        *({"rope_scaling": yarn} for yarn in YARNS),
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        {"tie_word_embeddings": True, "attention_bias": True, "n_shared_experts": 2},
        {"first_k_dense_replace": 4, "num_nextn_predict_layers": 0, "rope_theta": 5e5},
    ],
)
def test_there_and_back_with_transformers_between(changes: dict[str, Any], tmp_path) -> None:
    model = tiny_config(**changes)
    written = json.loads(json.dumps(to_hugging_face(model, torch.float32)))
    assert from_hugging_face(written) == model
    theirs = DeepseekV3Config.from_dict(dict(written))
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    assert "rope_scaling" not in saved
    assert from_hugging_face(saved) == model
    assert_same_rotation(model, theirs)


@pytest.mark.parametrize("attention_factor", [None, 0.9, 1.25])
@pytest.mark.parametrize("mscale", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("mscale_all_dim", [None, 0.0, 0.7, 1.0])
def test_every_combination_of_yarns_coefficients(
    mscale: float | None, mscale_all_dim: float | None, attention_factor: float | None
) -> None:
    scaling: dict[str, Any] = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 32}
    scaling |= {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    scaling |= {"attention_factor": attention_factor}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    written = to_hugging_face(tiny_config(), torch.float32) | {"rope_scaling": scaling}
    theirs = DeepseekV3Config.from_dict(json.loads(json.dumps(written)))
    assert_same_rotation(from_hugging_face(written), theirs)


def assert_same_rotation(model: ModelConfig, theirs: DeepseekV3Config) -> None:
    rotary = DeepseekV3RotaryEmbedding(theirs)
    ours = Rope(model)
    assert ours.factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert torch.equal(ours.freqs, rotary.inv_freq)
    attention = DeepseekV3Attention(theirs, 0)
    assert softmax_scale(model) == pytest.approx(attention.scaling, rel=1e-12)


def test_rows_undo_the_interleaving() -> None:
    """Rotating permuted rows half-split equals transformers' interleaved rotation."""
    model = tiny_config()
    tokens, width = 5, model.qk_head_dim
    heads, nope = model.num_attention_heads, model.qk_nope_head_dim
    q = torch.randn(tokens, heads * width)
    kv = torch.randn(tokens, model.cache_dim)
    cos, sin = Rope(model).cos_sin(torch.arange(tokens), torch.float32)
    expected_q, expected_k = apply_rotary_pos_emb_interleave(
        q.view(tokens, heads, width)[..., nope:].transpose(0, 1)[None],
        kv[:, model.latent_rank :][None, None],
        torch.cat((cos, cos), -1)[None],
        torch.cat((sin, sin), -1)[None],
    )
    q_rows = rotary_rows(model, "model.layers.0.self_attn.q_b_proj.weight")
    kv_rows = rotary_rows(model, "model.layers.0.self_attn.kv_a_proj_with_mqa.bias")
    assert q_rows is not None
    assert kv_rows is not None
    ours_q = q[:, q_rows].view(tokens, heads, width)
    assert torch.equal(ours_q[..., :nope], q.view(tokens, heads, width)[..., :nope])
    assert torch.equal(
        half_split(ours_q[..., nope:], cos[:, None], sin[:, None]), expected_q[0].transpose(0, 1)
    )
    assert torch.equal(
        half_split(kv[:, kv_rows][:, model.latent_rank :], cos, sin), expected_k[0, 0]
    )
    assert torch.equal(q_rows[q_rows.argsort()], torch.arange(heads * width))


def half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_which_tensors_have_rotary_rows() -> None:
    model = tiny_config(q_lora_rank=None)
    for name in ("q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        assert rotary_rows(model, f"model.layers.2.self_attn.{name}") is not None
    for name in ("self_attn.q_a_proj.bias", "self_attn.kv_b_proj.weight", "mlp.gate.weight"):
        assert rotary_rows(model, f"model.layers.2.{name}") is None
    assert rotary_rows(model, "lm_head.weight") is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model_type": "llama"},
            "model_type of config.json is llama and dualray reads deepseek_v3; import a model of "
            "the DeepSeek-V3 architecture.",
        ),
        (
            {"architectures": ["DeepseekV3ForTokenClassification"]},
            "architectures of config.json is DeepseekV3ForTokenClassification and dualray reads "
            "DeepseekV3ForCausalLM; import a causal language model.",
        ),
        (
            {"kv_lora_rank": None},
            "kv_lora_rank is missing in config.json; take the config.json of the model.",
        ),
        (
            {"scoring_func": "softmax"},
            "scoring_func of config.json is softmax and dualray supports only sigmoid; import a "
            "model of the DeepSeek-V3 architecture.",
        ),
        ({"topk_method": "greedy"}, "topk_method of config.json is greedy and"),
        ({"hidden_act": "gelu"}, "hidden_act of config.json is gelu and"),
        ({"moe_layer_freq": 2}, "moe_layer_freq of config.json is 2 and"),
        ({"attention_dropout": 0.1}, "attention_dropout of config.json is 0.1 and"),
        ({"num_key_value_heads": 8}, "num_key_value_heads of config.json is 8 and"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type of config.json is linear and"),
        (
            {"rope_scaling": RELEASED["rope_scaling"] | {"truncate": False}},
            "rope_scaling.truncate of config.json is False and",
        ),
        (
            {"hidden_size": "7168"},
            'hidden_size of config.json is "7168" and must be a whole number; take the config.json '
            "of the model.",
        ),
        ({"num_hidden_layers": True}, "num_hidden_layers of config.json is true and must be a"),
        ({"n_shared_experts": 1.5}, "n_shared_experts of config.json is 1.5 and must be a whole"),
        ({"num_nextn_predict_layers": "1"}, 'num_nextn_predict_layers of config.json is "1" and'),
        ({"rms_norm_eps": None}, "rms_norm_eps of config.json is null and must be a finite number"),
        ({"rope_theta": math.inf}, "rope_theta of config.json is Infinity and must be a finite"),
        ({"norm_topk_prob": "no"}, 'norm_topk_prob of config.json is "no" and must be true or'),
        ({"architectures": "x"}, 'architectures of config.json is "x" and must be a list'),
        ({"rope_scaling": "yarn"}, 'rope_scaling of config.json is "yarn" and must be an object'),
        (
            {"rope_scaling": {"type": "yarn", "factor": "4"}},
            'rope_scaling.factor of config.json is "4" and must be a finite number',
        ),
        ({"qk_rope_head_dim": 63}, "model.qk_rope_head_dim is 63 and must be even"),
    ],
)
def test_what_is_not_supported(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hugging_face(RELEASED | changes)
    assert str(error.value).startswith(sentence)


def test_only_mla_has_a_hugging_face_form() -> None:
    model = tiny_config(attention="mha", q_lora_rank=None, kv_lora_rank=None)
    with pytest.raises(ConfigError) as error:
        to_hugging_face(model, torch.float32)
    assert str(error.value) == (
        "model.attention is mha and Hugging Face's deepseek_v3 has only mla; export a model whose "
        "model.attention is mla."
    )
    assert rotary_rows(model, "model.layers.0.self_attn.q_proj.weight") is None


def test_what_null_and_absence_mean() -> None:
    bare = {key: RELEASED[key] for key in RELEASED if key not in ("rope_scaling", "q_lora_rank")}
    model = from_hugging_face(
        bare | {"n_group": None, "topk_group": None, "n_shared_experts": None}
    )
    assert (model.q_lora_rank, model.n_group, model.n_shared_experts) == (1536, 1, 0)
    assert model.rope_scaling is None
    assert from_hugging_face(RELEASED | {"q_lora_rank": None}).q_lora_rank is None
    assert from_hugging_face(RELEASED | {"num_hidden_layers": 2}).first_k_dense_replace == 2
    assert not is_interleaved({"rope_interleave": False})
