"""The peer: transformers' DeepseekV3 with our weights in it, at its best settings.

Best means `sdpa` attention, `grouped_mm` experts, no key/value cache, fused AdamW on
parameters of the run's dtype. In bf16 that is less work per step than ours does: our
optimizer keeps fp32 masters and moments and sums gradients in fp32, theirs rounds to bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig
from dualray.model.hugging_face import is_interleaved, rotary_rows, to_hugging_face
from dualray.model.init import logical_tensors
from dualray.model.stage import Stage
from dualray.parallel.optimizer import OptimizerConfig


def import_transformers(command: str = "bench model") -> Any:
    """The transformers package; raises ConfigError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{command} compares with the package transformers, which is not installed",
            hint="install it with: pip install 'transformers>=5.20,<6'",
        ) from None
    return transformers


class HuggingFaceTrainer:
    """One process training `DeepseekV3ForCausalLM`, with the numbers of `stage` copied in."""

    name = "hugging_face"

    def __init__(
        self, config: ModelConfig, stage: Stage, optimizer: OptimizerConfig, lr: float, clip: float
    ) -> None:
        self.model = new_model(config, stage)
        self._clip = clip
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self, ids_BS: Tensor, labels_BS: Tensor) -> float:
        """One optimizer step; returns the mean loss in nats before it."""
        loss = self.model(ids_BS, labels=labels_BS, shift_labels=labels_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def new_model(
    config: ModelConfig,
    stage: Stage,
    *,
    settings: Mapping[str, Any] | None = None,
    attention: str = "sdpa",
    experts: str = "grouped_mm",
) -> Any:
    """transformers' model with the stage's dtype and weights.

    `settings` is its config.json; by default the one that `config` is exported with, but for the
    rotary dims, which stay half-split as ours.
    """
    transformers = import_transformers()
    dtype = next(stage.parameters()).dtype
    if settings is None:
        settings = to_hugging_face(config, dtype) | {"rope_interleave": False}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.DeepseekV3Config.from_dict(copy.deepcopy(dict(settings))),
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # As from_pretrained has it; from_config leaves it in the dtype of the weights.
            buffer.data = buffer.to(torch.promote_types(dtype, torch.float32))
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    copy_weights(stage, tensors, interleaved=is_interleaved(settings))
    return model.train()


@torch.no_grad()
def copy_weights(stage: Stage, tensors: Mapping[str, Tensor], *, interleaved: bool) -> None:
    """Fill transformers' `tensors`, named as in its state dict, from the stage."""
    ours = logical_tensors(stage)
    for name, theirs in logical_views(tensors).items():
        rows = rotary_rows(stage.config, name) if interleaved else None
        theirs.copy_(ours[name] if rows is None else ours[name][rows.argsort()])


def logical_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views onto transformers' tensors under logical names: it stacks the experts of a layer.

    Its shared experts of width 0, where there are none, are left out.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if prefix.endswith(".experts"):
            parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
            for expert, stacked in enumerate(tensor):
                for part, view in zip(parts, stacked.chunk(len(parts))):
                    views[f"{prefix}.{expert}.{part}_proj.weight"] = view
        elif tensor.numel():
            views[name] = tensor
    return views
