"""Multi-head Latent Attention (arXiv 2412.19437, section 2.1.1).

T tokens, D model, H heads, C latent, R rotary width, B sequences, S their length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualray.model.config import ModelConfig
from dualray.model.context import ForwardContext, LatentQuery
from dualray.model.linear import Linear
from dualray.model.rope import rotate, softmax_scale

_LATENT_NORM_EPS = 1e-6  # fixed in the released model, whatever rms_norm_eps says


class MultiHeadLatentAttention(nn.Module):
    """Compresses, rotates, and leaves the attending to the context's backend."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.softmax_scale = softmax_scale(config)
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.latent_dim)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=_LATENT_NORM_EPS)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)

    def _queries(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_TD, ctx.weight_grads)
        compressed = self.q_a_layernorm(self.q_a_proj(x_TD, ctx.weight_grads))
        return self.q_b_proj(compressed, ctx.weight_grads)

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        config = self.config
        assert ctx.cos_sin is not None, "the stage sets the rotary angles before its layers run"
        q_THd = self._queries(x_TD, ctx).view(-1, config.num_attention_heads, config.qk_head_dim)
        q_nope, q_rope = q_THd.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_TD, ctx.weight_grads).split(
            (config.kv_lora_rank, config.qk_rope_head_dim), dim=-1
        )
        query = LatentQuery(
            layer=self.layer,
            q_nope_THN=q_nope,
            q_rope_THR=rotate(q_rope, *ctx.cos_sin),
            latent_TC=self.kv_a_layernorm(latent),
            k_rope_TR=rotate(k_rope, *ctx.cos_sin),
            kv_b=self.kv_b_proj,
            softmax_scale=self.softmax_scale,
        )
        out_THV = ctx.attention.attend(query, ctx)
        return self.o_proj(out_THV.flatten(1), ctx.weight_grads)


class CausalAttention:
    """Training's backend: expand keys and values from the latent, attend causally.

    Each packed sequence attends within itself. Sequences of one length go through a single
    call; otherwise one call per run of equal lengths.
    """

    def attend(self, query: LatentQuery, ctx: ForwardContext) -> Tensor:
        T, H, nope = query.q_nope_THN.shape
        kv = query.kv_b(query.latent_TC, ctx.weight_grads).view(T, H, -1)
        k_nope, value = kv.split((nope, kv.shape[-1] - nope), dim=-1)
        k_rope = query.k_rope_TR[:, None].expand(-1, H, -1)
        q = torch.cat((query.q_nope_THN, query.q_rope_THR), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        # Equal head widths let torch take its flash kernel instead of the plain one.
        v_dim = value.shape[-1]
        if v_dim < q.shape[-1]:
            value = F.pad(value, (0, q.shape[-1] - v_dim))
        outs, start = [], 0
        for length, count in _runs(ctx.seq_lens):
            end = start + length * count
            q_b, k_b, v_b = (
                t[start:end].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, value)
            )
            out = F.scaled_dot_product_attention(
                q_b, k_b, v_b, is_causal=True, scale=query.softmax_scale
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
            start = end
        assert start == T, f"sequence lengths sum to {start}, tokens are {T}"
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[..., :v_dim]


def _runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Adjacent equal lengths as (length, count)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs
