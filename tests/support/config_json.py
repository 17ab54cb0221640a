"""Small config.json files of `deepseek_v3`, drawn by hypothesis: what the parity tests run over.

PARITY_EXAMPLES=500 draws that many of them, and others at every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st

from dualray.model.hugging_face import ARCHITECTURE, MODEL_TYPE

MSCALES = (None, 0.0, 0.707, 1.0, 1.3)
"""None leaves the key out."""


def examples(number: int) -> settings:
    """The same `number` of examples at every run, unless the environment asks for others.

    A failing one is small enough; to shrink it would take minutes.
    """
    asked = os.environ.get("PARITY_EXAMPLES")
    return settings(
        max_examples=int(asked or number),
        derandomize=asked is None,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config.json and what runs through its model."""

    settings: dict[str, Any]
    seq_lens: tuple[int, ...]
    first_position: int
    seed: int


@st.composite
def yarns(draw: Callable[..., Any]) -> dict[str, Any]:
    """`rope_scaling` with any of its optional keys missing."""
    scaling = {
        "type": "yarn",
        "factor": draw(st.sampled_from((1.0, 4.0, 40.0))),
        # 3 is less than one turn of the fastest frequency, 4096 more than a sequence is long.
        "original_max_position_embeddings": draw(st.sampled_from((3, 8, 64, 4096))),
        "beta_fast": draw(st.sampled_from((None, 32, 4))),
        "beta_slow": draw(st.sampled_from((None, 1, 16))),
        "mscale": draw(st.sampled_from(MSCALES)),
        "mscale_all_dim": draw(st.sampled_from(MSCALES)),
    }
    return {key: value for key, value in scaling.items() if value is not None}


@st.composite
def config_jsons(draw: Callable[..., Any]) -> dict[str, Any]:
    """Every choice that the architecture leaves, at small and odd widths; no MTP modules."""
    layers = draw(st.integers(1, 3))
    groups = draw(st.sampled_from((1, 2, 4)))
    experts_per_group = draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    heads = draw(st.integers(1, 3))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": 61,
        "hidden_size": draw(st.sampled_from((16, 23, 32))),
        "intermediate_size": draw(st.sampled_from((16, 37))),
        "moe_intermediate_size": draw(st.sampled_from((5, 8))),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw(st.sampled_from((None, 8, 13))),
        "kv_lora_rank": draw(st.sampled_from((8, 11))),
        "qk_nope_head_dim": draw(st.sampled_from((5, 8))),
        "qk_rope_head_dim": draw(st.sampled_from((2, 6, 8))),
        "v_head_dim": draw(st.sampled_from((4, 9, 24))),
        "n_routed_experts": groups * experts_per_group,
        "n_shared_experts": draw(st.integers(0, 3)),
        "num_experts_per_tok": draw(st.integers(1, min(4, topk_group * experts_per_group))),
        "n_group": groups,
        "topk_group": topk_group,
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5))),
        "norm_topk_prob": draw(st.booleans()),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-3))),
        "rope_theta": draw(st.sampled_from((10000.0, 500000.0))),
        "rope_scaling": draw(st.none() | yarns()),
        "rope_interleave": draw(st.booleans()),
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 4096,
    }


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """One to three sequences of unequal lengths, which start anywhere in the context."""
    # Gradients are fp32's business only where they are not all cancelled: a token that attends
    # to itself alone gives its query none. So not every sequence is short.
    return Case(
        settings=draw(config_jsons()),
        seq_lens=(draw(st.integers(8, 24)), *draw(st.lists(st.integers(1, 20), max_size=2))),
        first_position=draw(st.sampled_from((0, 0, 7, 1000))),
        seed=draw(st.integers(0, 2**16)),
    )
