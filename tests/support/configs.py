"""hypothesis draws of model configurations of every kind that the architecture allows."""

from __future__ import annotations

from hypothesis import strategies as st
from support.models import tiny_config

from dualray.model.config import ATTENTIONS, ModelConfig


@st.composite
def configs(draw: st.DrawFn, attentions: tuple[str, ...] = ATTENTIONS) -> ModelConfig:
    """Tiny models: all attentions, with and without MTP, dense layers, shared experts, ties."""
    attention = draw(st.sampled_from(attentions))
    heads = draw(st.sampled_from([2, 4, 6]))
    is_mla = attention == "mla"
    return tiny_config(
        attention=attention,
        num_attention_heads=heads,
        num_key_value_heads=2 if attention == "gqa" else None,
        attention_bias=draw(st.booleans()),
        q_lora_rank=draw(st.sampled_from([None, 14])) if is_mla else None,
        kv_lora_rank=draw(st.integers(1, 20)) if is_mla else None,
        qk_nope_head_dim=draw(st.integers(1 if is_mla else 0, 11)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 13)),
        n_shared_experts=draw(st.integers(0, 3)),
        num_experts_per_tok=draw(st.integers(1, 4)),
        first_k_dense_replace=draw(st.integers(0, 4)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )
