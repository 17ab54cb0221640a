"""Our configuration and Hugging Face's `config.json` of `deepseek_v3`, both ways; no files.

Tensor names are the same on both sides. Two things differ. Hugging Face keeps the rotary dims
of queries and keys interleaved, (x0, x1), (x2, x3), ..., where ours are half-split: `rotary_rows`
is the permutation. And transformers derives YaRN's cos/sin factor from `mscale` only if both
coefficients are set and not zero, where DeepSeek's own code, and ours, always divide
m(mscale) by m(mscale_all_dim): `from_hugging_face` follows transformers, and
`to_hugging_face` writes `attention_factor` where the two would part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig, YarnConfig

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPE = "deepseek_v3"

_SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "n_routed_experts num_experts_per_tok"
).split()
"""Fields that every config.json states."""

_DEFAULTS: dict[str, Any] = {
    "q_lora_rank": 1536,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""What Hugging Face's `DeepseekV3Config` takes where config.json says nothing."""

_NULL_MEANS: dict[str, Any] = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1}

_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
}
"""Settings with one supported meaning, which absence has too."""

_OPTIONAL: dict[str, type] = {
    "architectures": list,
    "num_nextn_predict_layers": int,
    "num_mtp_layers": int,
    "rope_theta": float,
    "rope_interleave": bool,
    "rope_scaling": dict,
    "rope_parameters": dict,
}
"""Fields that may be absent or null."""

_ROTARY: dict[str, type] = {
    "original_max_position_embeddings": int,
    **dict.fromkeys(
        "rope_theta factor beta_fast beta_slow mscale mscale_all_dim attention_factor".split(),
        float,
    ),
}
"""The same of the rotary parameters."""

_KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a `config.json` of model type `deepseek_v3` describes.

    Reads the style of the released weights (`rope_theta`, `rope_scaling`) and that of
    transformers 5 (`rope_parameters`). MTP modules are those that the file names, 0 if it names
    none. Raises ConfigError for another architecture or a setting that is not supported.
    """
    _refuse_unsupported(config)
    values: dict[str, Any] = {name: config[name] for name in _SIZES}
    for name, default in _DEFAULTS.items():
        value = config.get(name, default)
        values[name] = _NULL_MEANS.get(name, value) if value is None else value
        if type(default) is float:
            values[name] = float(values[name])
    # Hugging Face lets it exceed the layers, with the same meaning.
    values["first_k_dense_replace"] = min(
        values["first_k_dense_replace"], values["num_hidden_layers"]
    )
    depths = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    rope = _rope(config)
    return ModelConfig(
        num_nextn_predict_layers=depths or 0,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_yarn(rope, values["max_position_embeddings"]),
        **values,
    )


def is_interleaved(config: Mapping[str, Any]) -> bool:
    """Whether the weights beside a `config.json` have interleaved rotary dims (the default)."""
    value = config.get("rope_interleave")
    return True if value is None else bool(value)


def to_hugging_face(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A complete `config.json` for weights of `dtype` with interleaved rotary dims.

    It says what transformers 5 asks and what older readers do (`topk_method`, `torch_dtype`,
    `rope_scaling.type`, ...). Raises ConfigError unless the attention is `mla`.
    """
    if config.attention != "mla":
        raise ConfigError(
            f"model.attention is {config.attention} and Hugging Face's {MODEL_TYPE} has only mla",
            hint="export a model whose model.attention is mla",
        )
    same = {name: getattr(config, name) for name in [*_SIZES, *_DEFAULTS]}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **same,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "rope_interleave": True,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def rotary_rows(config: ModelConfig, name: str) -> Tensor | None:
    """Where the rows of our tensor `name` lie in Hugging Face's interleaved one.

    int64, `ours = theirs[rows]` and `theirs = ours[rows.argsort()]`, for weights and biases
    alike; None for a tensor without rotary rows. No row leaves the rotary part of its head.
    """
    if config.attention != "mla":
        return None
    parts = name.split(".")
    module = parts[-2] if len(parts) > 1 else ""
    rope = config.qk_rope_head_dim
    if module in ("q_proj", "q_b_proj"):
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    elif module == "kv_a_proj_with_mqa":
        heads, nope = 1, config.latent_rank
    else:
        return None
    rotary = torch.cat((torch.arange(0, rope, 2), torch.arange(1, rope, 2)))
    one_head = torch.cat((torch.arange(nope), nope + rotary))
    first_rows = torch.arange(heads) * (nope + rope)
    return (first_rows[:, None] + one_head).flatten()


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        raise ConfigError(
            f"model_type of config.json is {model_type} and dualray reads {MODEL_TYPE}",
            hint="import a model of the DeepSeek-V3 architecture",
        )
    _refuse_other_kinds(config)
    architectures = config.get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in architectures:
        raise ConfigError(
            f"architectures of config.json is {', '.join(map(str, architectures))} and dualray "
            f"reads {ARCHITECTURE}",
            hint="import a causal language model",
        )
    for name, supported in _FIXED.items():
        if name in config and config[name] not in supported:
            raise _unsupported(name, config[name], supported[0])
    key_value_heads = config.get("num_key_value_heads")
    if key_value_heads not in (None, config["num_attention_heads"]):
        raise _unsupported("num_key_value_heads", key_value_heads, config["num_attention_heads"])


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    for name in _SIZES:
        if config.get(name) is None:
            raise ConfigError(
                f"{name} is missing in config.json", hint="take the config.json of the model"
            )
        _expect(name, config[name], int)
    for name, default in _DEFAULTS.items():
        value = config.get(name, default)
        if value is not None or name not in ("q_lora_rank", *_NULL_MEANS):
            _expect(name, value, type(default))
    for name, kind in _OPTIONAL.items():
        if config.get(name) is not None:
            _expect(name, config[name], kind)
    rope = _rope(config)
    for name, kind in _ROTARY.items():
        if rope.get(name) is not None:
            _expect(f"rope_scaling.{name}", rope[name], kind)


def _expect(name: str, value: Any, kind: type) -> None:
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ConfigError(
            f"{name} of config.json is {json.dumps(value)} and must be {_KINDS[kind]}",
            hint="take the config.json of the model",
        )


def _unsupported(name: str, value: Any, supported: Any) -> ConfigError:
    return ConfigError(
        f"{name} of config.json is {value} and dualray supports only {supported}",
        hint="import a model of the DeepSeek-V3 architecture",
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary parameters in either style; both give their keys the same meaning."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _yarn(rope: Mapping[str, Any], max_position_embeddings: int) -> YarnConfig | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("yarn", "deepseek_yarn"):
        raise _unsupported("rope_scaling.type", kind, "yarn")
    if rope.get("truncate", True) is False:
        raise _unsupported("rope_scaling.truncate", False, True)
    original = rope.get("original_max_position_embeddings") or max_position_embeddings
    factor = float(rope.get("factor") or max_position_embeddings / original)
    all_dim = float(rope.get("mscale_all_dim") or 0.0)
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        mscale=_mscale(rope, factor, all_dim),
        mscale_all_dim=all_dim,
    )


def _their_factor(mscale: float | None, all_dim: float, factor: float) -> float:
    """transformers' cos/sin factor where `attention_factor` is not given."""
    if mscale and all_dim:
        return _m(mscale, factor) / _m(all_dim, factor)
    return _m(1.0, factor)


def _mscale(rope: Mapping[str, Any], factor: float, all_dim: float) -> float:
    """The coefficient with which our m(mscale) / m(mscale_all_dim) is their cos/sin factor."""
    given = rope.get("mscale")
    wanted = rope.get("attention_factor")
    if wanted is None:
        wanted = _their_factor(given, all_dim, factor)
    for ours in (given, 1.0, all_dim):
        if ours is not None and math.isclose(_our_factor(ours, all_dim, factor), wanted):
            return float(ours)
    if factor <= 1.0:
        raise _unsupported("rope_scaling.attention_factor", wanted, "1.0 with a factor of 1")
    return (wanted * _m(all_dim, factor) - 1.0) / (0.1 * math.log(factor))


def _our_factor(mscale: float, all_dim: float, factor: float) -> float:
    return _m(mscale, factor) / _m(all_dim, factor)


def _rope_scaling(yarn: YarnConfig | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    scaling: dict[str, Any] = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    ours = _our_factor(yarn.mscale, yarn.mscale_all_dim, yarn.factor)
    if not math.isclose(ours, _their_factor(yarn.mscale, yarn.mscale_all_dim, yarn.factor)):
        scaling["attention_factor"] = ours
    return scaling


def _m(coefficient: float, factor: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * coefficient * math.log(factor) + 1.0
