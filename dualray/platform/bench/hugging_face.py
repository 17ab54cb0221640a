"""The peer: transformers' DeepseekV3 with our weights in it, at its best settings.

Best means `sdpa` attention, `grouped_mm` experts, no key/value cache, fused AdamW on
parameters of the run's dtype. In bf16 that is less work per step than ours does: our
optimizer keeps fp32 masters and moments and sums gradients in fp32, theirs rounds to bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig
from dualray.model.init import logical_tensors
from dualray.model.stage import Stage
from dualray.parallel.optimizer import OptimizerConfig

_SAME_NAMES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group "
    "routed_scaling_factor norm_topk_prob first_k_dense_replace max_position_embeddings "
    "rms_norm_eps tie_word_embeddings initializer_range"
).split()


def import_transformers() -> Any:
    """The transformers package; raises ConfigError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "bench training compares with the package transformers, which is not installed",
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


def new_model(config: ModelConfig, stage: Stage) -> Any:
    """transformers' model in the stage's dtype and with its weights.

    Only plain RoPE; our rotary layout is the half-split one, which transformers has too.
    """
    assert config.rope_scaling is None, "the benchmark's shapes use plain RoPE"
    transformers = import_transformers()
    theirs = transformers.DeepseekV3Config(
        **{name: getattr(config, name) for name in _SAME_NAMES},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rope_interleave=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        theirs,
        dtype=next(stage.parameters()).dtype,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    copy_weights(logical_tensors(stage), model)
    return model.train()


@torch.no_grad()
def copy_weights(logical: dict[str, Tensor], model: Any) -> None:
    """Fill `model` from logical tensors; transformers stacks the experts of a layer."""
    for name, target in model.state_dict().items():
        if ".experts." not in name:
            target.copy_(logical[name])
            continue
        prefix, _, kind = name.rpartition(".")
        parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
        for expert, slot in enumerate(target):
            own = [logical[f"{prefix}.{expert}.{part}_proj.weight"] for part in parts]
            slot.copy_(torch.cat(own))
