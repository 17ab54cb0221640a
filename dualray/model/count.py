"""How many parameters a configuration has, counted on the meta device: no formula can drift."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dualray.model.config import ModelConfig
from dualray.model.moe import Experts
from dualray.model.stage import Stage


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the main model, those a token uses, and what the MTP modules add."""

    total: int
    active: int
    mtp: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts without memory: the stage is built on the meta device."""
    with torch.device("meta"):
        stage = Stage(config)
    mtp_names = {str(config.num_hidden_layers + d) for d in range(config.num_nextn_predict_layers)}
    total = mtp = idle = 0
    for name, parameter in stage.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers" and parts[1] in mtp_names:
            mtp += parameter.numel()
            continue
        total += parameter.numel()
    for name, module in stage.named_modules():
        if isinstance(module, Experts) and name.split(".")[1] not in mtp_names:
            held = sum(p.numel() for p in module.parameters())
            share = config.num_experts_per_tok / config.n_routed_experts
            idle += held - round(held * share)
    return ParameterCount(total=total, active=total - idle, mtp=mtp)
