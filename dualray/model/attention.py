"""Multi-head Latent Attention (arXiv 2412.19437, section 2.1.1), and what it is compared with.

All kinds hand an `AttentionQuery` to the context's backend, which attends. T tokens, D model,
H heads, G key/value heads, N nope width, R rotary width, V value width, C latent, L cached
values per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualray.kernels.causal_attention import causal_attention
from dualray.model.config import ModelConfig
from dualray.model.context import AttentionQuery, ForwardContext
from dualray.model.linear import Linear
from dualray.model.norm import RMSNorm, normed
from dualray.model.recompute import Again
from dualray.model.rope import rotate_tail, softmax_scale

_LATENT_NORM_EPS = 1e-6  # fixed in the released model, whatever rms_norm_eps says


@dataclass(frozen=True, kw_only=True)
class LatentQuery:
    """MLA's `AttentionQuery`: compressed and normalised latent, one rotated key for all heads.

    `kv_b` expands the latent to (H * (N + V)). Over cached rows it is absorbed instead: its key
    half is folded into the query and its value half into the output (section 2.1.1's remark).
    """

    layer: int
    q_THd: Tensor
    latent_TC: Tensor
    k_rope_TR: Tensor
    kv_b: Linear
    softmax_scale: float
    latent_again: Again | None = None
    """Makes `latent_TC` again in the backward, if that is wanted."""

    def cache_rows(self) -> Tensor:
        return torch.cat((self.latent_TC, self.k_rope_TR), dim=-1)

    @property
    def _nope(self) -> int:
        return self.q_THd.shape[-1] - self.k_rope_TR.shape[-1]

    def expand(self, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        T, H, _ = self.q_THd.shape
        nope, kv_b, k_rope_TR = self._nope, self.kv_b, self.k_rope_TR
        kv_THd = kv_b(self.latent_TC, ctx.weight_grads).view(T, H, -1)
        k_nope, value = kv_THd.split((nope, kv_THd.shape[-1] - nope), dim=-1)
        key = _with_rotary(k_nope, k_rope_TR)
        if ctx.recompute is not None:
            assert self.latent_again is not None
            latent, k_rope_TR = self.latent_again, k_rope_TR.detach()
            kv = ctx.recompute.forget(lambda: (kv_b(latent.look(), None).view(T, H, -1),), kv_THd)
            ctx.recompute.forget(lambda: (_with_rotary(kv.look()[..., :nope], k_rope_TR),), key)
        return self.q_THd, key, value

    def cache_queries(self) -> Tensor:
        up_HNC = self._up_projection()[:, : self._nope]
        q_nope, q_rope = self.q_THd.split((self._nope, self.k_rope_TR.shape[-1]), dim=-1)
        folded_HTC = torch.bmm(q_nope.transpose(0, 1), up_HNC)
        return torch.cat((folded_HTC.transpose(0, 1), q_rope), dim=-1)

    def cache_keys(self, rows_L: Tensor) -> Tensor:
        return rows_L.unsqueeze(-2)

    def cache_values(self, rows_L: Tensor) -> Tensor:
        # With the rotary key, which the output drops: torch's flash kernel wants equal widths.
        return rows_L.unsqueeze(-2)

    def cache_output(self, out_THc: Tensor) -> Tensor:
        up_HVC = self._up_projection()[:, self._nope :]
        out_HTC = out_THc[..., : up_HVC.shape[-1]].transpose(0, 1)
        return torch.bmm(out_HTC, up_HVC.transpose(1, 2)).transpose(0, 1)

    def _up_projection(self) -> Tensor:
        return self.kv_b.weight.view(self.q_THd.shape[1], -1, self.latent_TC.shape[1])


def _with_rotary(k_nope_THN: Tensor, k_rope_TR: Tensor) -> Tensor:
    """Keys of all heads: their own channels, then the rotary ones they share."""
    heads = k_nope_THN.shape[1]
    return torch.cat((k_nope_THN, k_rope_TR[:, None].expand(-1, heads, -1)), dim=-1)


@dataclass(frozen=True, kw_only=True)
class HeadsQuery:
    """`AttentionQuery` of plain heads: keys and values as they are, and cached as they are."""

    layer: int
    q_THd: Tensor
    k_TGd: Tensor
    v_TGV: Tensor
    softmax_scale: float

    @property
    def _key_values(self) -> int:
        """How many values of a cached row are keys. There may be no token to look at."""
        return self.k_TGd.shape[1:].numel()

    def cache_rows(self) -> Tensor:
        return torch.cat((self.k_TGd.flatten(1), self.v_TGV.flatten(1)), dim=-1)

    def expand(self, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_THd, self.k_TGd, self.v_TGV

    def cache_queries(self) -> Tensor:
        return self.q_THd

    def cache_keys(self, rows_L: Tensor) -> Tensor:
        return rows_L[..., : self._key_values].unflatten(-1, self.k_TGd.shape[1:])

    def cache_values(self, rows_L: Tensor) -> Tensor:
        return rows_L[..., self._key_values :].unflatten(-1, self.v_TGV.shape[1:])

    def cache_output(self, out_THc: Tensor) -> Tensor:
        return out_THc


class MultiHeadLatentAttention(nn.Module):
    """Compresses, rotates, and leaves the attending to the context's backend."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.softmax_scale = softmax_scale(config)
        heads, bias = config.num_attention_heads, config.attention_bias
        self._latent_widths = (config.latent_rank, config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
            self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.cache_dim, bias=bias)
        else:
            # Both compress the residual stream: one GEMM.
            compressed = {"q_a_proj": config.q_lora_rank, "kv_a_proj_with_mqa": config.cache_dim}
            self.qkv_a_proj = Linear(config.hidden_size, compressed, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_layernorm = RMSNorm(config.latent_rank, eps=_LATENT_NORM_EPS)
        self.kv_b_proj = Linear(
            config.latent_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
        )
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)

    def _project(self, x_TD: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (T, H, d), latent (T, C) and rotary key (T, R) as projected."""
        rank, sink = self.config.q_lora_rank, ctx.weight_grads
        if rank is None:
            latent, k_rope = self.kv_a_proj_with_mqa(x_TD, sink).split(self._latent_widths, dim=-1)
            return self._queries(self.q_proj(x_TD, sink), ctx), latent, k_rope
        widths = (rank, *self._latent_widths)
        compressed, latent, k_rope = self.qkv_a_proj(x_TD, sink).split(widths, dim=-1)
        normed_q, again = normed(self.q_a_layernorm, compressed, ctx)
        q_THd = self._queries(self.q_b_proj(normed_q, sink), ctx)
        if ctx.recompute is not None:
            assert again is not None
            ctx.recompute.forget(
                lambda: (self._queries(self.q_b_proj(again.look(), None), ctx),), q_THd
            )
        return q_THd, latent, k_rope

    def _queries(self, q: Tensor, ctx: ForwardContext) -> Tensor:
        assert ctx.cos_sin is not None, "the stage sets the rotary angles before its layers run"
        heads = q.view(-1, self.config.num_attention_heads, self.config.qk_head_dim)
        return rotate_tail(heads, *ctx.cos_sin)

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        q_THd, latent, k_rope = self._project(x_TD, ctx)
        assert ctx.cos_sin is not None
        latent_TC, latent_again = normed(self.kv_a_layernorm, latent, ctx)
        query = LatentQuery(
            layer=self.layer,
            q_THd=q_THd,
            latent_TC=latent_TC,
            k_rope_TR=rotate_tail(k_rope, *ctx.cos_sin),
            kv_b=self.kv_b_proj,
            softmax_scale=self.softmax_scale,
            latent_again=latent_again,
        )
        return self.o_proj(ctx.attention.attend(query, ctx).flatten(1), ctx.weight_grads)


class GroupedQueryAttention(nn.Module):
    """MHA, GQA and MQA (arXiv 1706.03762, 2305.13245, 1911.02150): they differ in G alone."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.softmax_scale = softmax_scale(config)
        heads, groups = config.num_attention_heads, config.key_value_heads
        self._shapes = (
            (heads, config.qk_head_dim),
            (groups, config.qk_head_dim),
            (groups, config.v_head_dim),
        )
        names = ("q_proj", "k_proj", "v_proj")
        widths = {name: count * width for name, (count, width) in zip(names, self._shapes)}
        self.qkv_proj = Linear(config.hidden_size, widths, bias=config.attention_bias)
        self.o_proj = Linear(
            heads * config.v_head_dim, config.hidden_size, bias=config.attention_bias
        )

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        assert ctx.cos_sin is not None, "the stage sets the rotary angles before its layers run"
        joint = self.qkv_proj(x_TD, ctx.weight_grads).split((*self.qkv_proj.parts.values(),), -1)
        q, k, v = (part.unflatten(-1, shape) for part, shape in zip(joint, self._shapes))
        query = HeadsQuery(
            layer=self.layer,
            q_THd=rotate_tail(q, *ctx.cos_sin),
            k_TGd=rotate_tail(k, *ctx.cos_sin),
            v_TGV=v,
            softmax_scale=self.softmax_scale,
        )
        return self.o_proj(ctx.attention.attend(query, ctx).flatten(1), ctx.weight_grads)


def make_attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention that `config.attention` names."""
    if config.attention == "mla":
        return MultiHeadLatentAttention(config, layer)
    return GroupedQueryAttention(config, layer)


class CausalAttention:
    """Training's backend: expand keys and values, attend causally.

    Each packed sequence attends within itself. Sequences of one length go through a single
    call; otherwise one call per run of equal lengths.
    """

    def attend(self, query: AttentionQuery, ctx: ForwardContext) -> Tensor:
        q, k, v = query.expand(ctx)
        runs = _runs(ctx.seq_lens)
        tokens = [length * count for length, count in runs]
        assert sum(tokens) == len(q), f"sequence lengths sum to {sum(tokens)}, tokens are {len(q)}"
        # A single run is not split: the backward would copy what it was made of.
        split = [[t] if len(runs) == 1 else t.split(tokens) for t in (q, k, v)]
        outs = []
        for (length, count), *parts in zip(runs, *split):
            q_b, k_b, v_b = (t.unflatten(0, (count, length)).transpose(1, 2) for t in parts)
            out = causal_attention(q_b, k_b, v_b, query.softmax_scale)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Adjacent equal lengths as (length, count)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs
