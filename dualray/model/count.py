"""Parameters counted on the meta device: what the formulas of `formulas.py` are held against.

The stage that is built is the one that trains, so no formula can drift from it unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dualray.model.config import ModelConfig
from dualray.model.formulas import ParameterCount, unused_parameters
from dualray.model.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Parameters by part, under the names of `main_parameters` and `mtp_parameters`."""

    main: dict[str, int]
    mtp: dict[str, int]


def count_parts(config: ModelConfig) -> Counted:
    """Counts without memory; parts that the model lacks are missing."""
    with torch.device("meta"):
        stage = Stage(config)
    counted = Counted(main={}, mtp={})
    for name, parameter in stage.named_parameters():
        layer = name.split(".")[1] if name.startswith("layers.") else "0"
        parts = counted.mtp if int(layer) >= config.num_hidden_layers else counted.main
        part = _part(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return counted


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Total, active and MTP parameters of the model as it is built."""
    counted = count_parts(config)
    total = sum(counted.main.values())
    unused = unused_parameters(config, {"routed_experts": 0} | counted.main)
    return ParameterCount(total=total, active=total - unused, mtp=sum(counted.mtp.values()))


def _part(name: str) -> str:
    """The part that a parameter belongs to."""
    module = name.rpartition(".")[0]
    if module.endswith("norm"):
        return "norms"
    for piece, part in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("self_attn", "attention"),
        ("mlp.gate", "router"),
        ("mlp.shared_experts", "shared_experts"),
        ("mlp.experts", "routed_experts"),
        ("mlp", "dense_ffn"),
        ("eh_proj", "projection"),
    ):
        # Whole words: `mlp.gate_up_proj` is not the router.
        if f".{piece}." in f".{name}.":
            return part
    raise AssertionError(f"{name} belongs to no part")
