"""Tiny configurations with odd shapes, and one forward-backward of the whole model."""

from __future__ import annotations

import torch
from torch import Tensor

from dualray.model.attention import CausalAttention
from dualray.model.config import ModelConfig
from dualray.model.context import ForwardContext, RoutingTape, WeightGradSink
from dualray.model.init import initialise
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Losses, Stage


def tiny_config(**changes) -> ModelConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return ModelConfig(**(values | changes))


def whole_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Stage:
    """The reference: one stage that holds every layer, with non-zero router biases."""
    stage = Stage(config).to(dtype)
    initialise(stage, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in stage.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
    return stage


def training_context(
    config: ModelConfig,
    seq_lens: tuple[int, ...],
    *,
    sink: WeightGradSink | None = None,
    balance_scale: float = 0.0,
    tape: RoutingTape | None = None,
) -> ForwardContext:
    return ForwardContext(
        positions_T=torch.cat([torch.arange(n) for n in seq_lens]),
        seq_lens=seq_lens,
        attention=CausalAttention(),
        dispatch=LocalDispatch(config.n_routed_experts),
        weight_grads=sink,
        balance_scale=balance_scale,
        tape=tape,
        loads={},
    )


def random_batch(config: ModelConfig, num_sequences: int, seq_len: int, seed: int = 0):
    """ids (B, S) and labels (1 + D, B, S) cut from random windows."""
    generator = torch.Generator().manual_seed(seed)
    depths = config.num_nextn_predict_layers
    window = torch.randint(
        config.vocab_size, (num_sequences, seq_len + 1 + depths), generator=generator
    )
    ids = window[:, :seq_len]
    labels = torch.stack([window[:, d + 1 : d + 1 + seq_len] for d in range(depths + 1)])
    return ids, labels


def forward_losses(stage: Stage, ids_BS: Tensor, labels_DBS: Tensor, ctx: ForwardContext) -> Losses:
    x_TD = stage.embed(ids_BS.flatten(), ctx)
    return stage.losses(stage(x_TD, ctx), labels_DBS.flatten(1), ctx)


def attention_changes(kind: str) -> dict:
    """What `tiny_config` must change to have that kind of attention."""
    if kind == "mla":
        return {}
    changes = {"attention": kind, "q_lora_rank": None, "kv_lora_rank": None}
    changes |= {"num_attention_heads": 4}
    return changes | ({"num_key_value_heads": 2} if kind == "gqa" else {})
