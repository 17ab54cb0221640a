"""How large a model is and how much work a token is, by formula.

Parameters are those of arXiv 2412.19437, section 2, part by part. What a token *uses* (the
"active" parameters) is everything but the routed experts it does not visit and the embedding,
of which it reads one row and multiplies with none; a tied embedding is the head and counts.
For DeepSeek-V3 that is 36.6B, as its authors count ("including 0.9B for the output Head"),
which the report rounds to 37B.

Work is counted as in arXiv 2505.09343, table 2: a multiply-add is two operations, and only
matrix products count. Norms, activations, softmax, rotation, biases and the embedding's look-up
are left out; together they are less than 1 % of a large model's work.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualray.model.config import ModelConfig

_UNBIASED = frozenset(("q_b_proj", "kv_b_proj"))


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the main model, those a token uses, and what the MTP modules add.

    `mtp` is the modules' own: the embedding and the head are the main model's.
    """

    total: int
    active: int
    mtp: int


def attention_projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the projections of one layer's attention, by name."""
    D, H = config.hidden_size, config.num_attention_heads
    d, v = config.qk_head_dim, config.v_head_dim
    if config.attention != "mla":
        G = config.key_value_heads
        return {
            "q_proj": (H * d, D),
            "k_proj": (G * d, D),
            "v_proj": (G * v, D),
            "o_proj": (D, H * v),
        }
    rank = config.q_lora_rank
    queries = (
        {"q_proj": (H * d, D)}
        if rank is None
        else {"q_a_proj": (rank, D), "q_b_proj": (H * d, rank)}
    )
    return queries | {
        "kv_a_proj_with_mqa": (config.cache_dim, D),
        "kv_b_proj": (H * (config.qk_nope_head_dim + v), config.latent_rank),
        "o_proj": (D, H * v),
    }


def attention_biases(config: ModelConfig) -> int:
    """Bias values of one layer's attention: of what reads or writes the residual stream."""
    if not config.attention_bias:
        return 0
    # As in the released code, MLA's uncompressed queries have none.
    unbiased = _UNBIASED | ({"q_proj"} if config.attention == "mla" else set())
    shapes = attention_projections(config)
    return sum(out for name, (out, _) in shapes.items() if name not in unbiased)


def main_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the main model by part; a tied head has none of its own."""
    layers, dense = config.num_hidden_layers, config.first_k_dense_replace
    vocabulary = config.vocab_size * config.hidden_size
    moe = _moe_layer(config)
    return {
        "embedding": vocabulary,
        "head": 0 if config.tie_word_embeddings else vocabulary,
        "attention": layers * _attention(config),
        "dense_ffn": dense * 3 * config.hidden_size * config.intermediate_size,
        **{part: (layers - dense) * size for part, size in moe.items()},
        "norms": layers * _layer_norms(config) + config.hidden_size,
    }


def mtp_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the MTP modules by part, embedding and head excluded.

    `projection` is the 2D x D matrix that joins the embedding with the hidden state.
    """
    depths, D = config.num_nextn_predict_layers, config.hidden_size
    parts = {
        "projection": 2 * D * D,
        "attention": _attention(config),
        **_moe_layer(config),
        # Over the embedding, over the hidden state, and before the head.
        "norms": _layer_norms(config) + 3 * D,
    }
    return {part: depths * size for part, size in parts.items()}


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Total, active and MTP parameters; see the top of this file for what is active."""
    main = main_parameters(config)
    total = sum(main.values())
    active = total - unused_parameters(config, main)
    return ParameterCount(total=total, active=active, mtp=sum(mtp_parameters(config).values()))


def unused_parameters(config: ModelConfig, main: dict[str, int]) -> int:
    """Of the main model's `main` parts, what a token does not use."""
    unvisited = config.n_routed_experts - config.num_experts_per_tok
    idle = main["routed_experts"] // config.n_routed_experts * unvisited
    return idle + (0 if config.tie_word_embeddings else main["embedding"])


def multiplied_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: the active ones without norms and biases."""
    biases = config.num_hidden_layers * attention_biases(config)
    return parameter_count(config).active - main_parameters(config)["norms"] - biases


def mtp_multiplied_parameters(config: ModelConfig) -> int:
    """The same for all MTP modules together; each multiplies with the shared head once more."""
    depths = config.num_nextn_predict_layers
    parts = mtp_parameters(config)
    unvisited = config.n_routed_experts - config.num_experts_per_tok
    idle = parts["routed_experts"] // config.n_routed_experts * unvisited
    own = sum(parts.values()) - parts["norms"] - depths * attention_biases(config) - idle
    return own + depths * config.vocab_size * config.hidden_size


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """What serving remembers of a token: `cache_dim` values in each layer (2 bytes: BF16)."""
    return config.num_hidden_layers * config.cache_dim * bytes_per_value


def attention_flops(config: ModelConfig, num_keys: float, *, absorbed: bool = False) -> float:
    """Operations of one layer's scores and weighted sum, for one query token over `num_keys`.

    2 H (d + v) per key. Absorbed MLA (decoding) attends over the latent itself: 2 H (L + C) per
    key with L = cache_dim and C = kv_lora_rank. Folding the up-projection into query and output
    takes what expanding one token would, so both forms multiply with `kv_b_proj` once a token.
    """
    if absorbed and config.attention == "mla":
        per_key = config.cache_dim + config.latent_rank
    else:
        per_key = config.qk_head_dim + config.v_head_dim
    return 2 * config.num_attention_heads * per_key * num_keys


def forward_flops(config: ModelConfig, num_keys: float, *, absorbed: bool = False) -> float:
    """Operations of the main model's forward per token, logits included.

    2 x `multiplied_parameters` + layers x `attention_flops`. In a causal sequence of S tokens a
    token sees (S + 1) / 2 keys on average; one decoded at context N sees N.
    """
    per_layer = attention_flops(config, num_keys, absorbed=absorbed)
    return 2 * multiplied_parameters(config) + config.num_hidden_layers * per_layer


def layer_flops(config: ModelConfig, layer: int, num_keys: float) -> float:
    """Operations of one layer's forward per token; layers past the last are MTP modules.

    A module has a projection and the head besides its layer.
    """
    D = config.hidden_size
    weights = sum(out * into for out, into in attention_projections(config).values())
    if layer >= config.num_hidden_layers:
        weights += 2 * D * D + config.vocab_size * D
    if config.is_moe(layer) or layer >= config.num_hidden_layers:
        experts = config.num_experts_per_tok + config.n_shared_experts
        weights += 3 * D * config.moe_intermediate_size * experts + config.n_routed_experts * D
    else:
        weights += 3 * D * config.intermediate_size
    return 2 * weights + attention_flops(config, num_keys)


def head_flops(config: ModelConfig) -> float:
    """Operations of the logits per token."""
    return 2 * config.vocab_size * config.hidden_size


def training_flops(config: ModelConfig, seq_len: int, *, with_mtp: bool = True) -> float:
    """Operations per trained token in sequences of `seq_len`: three forwards.

    A backward is two products for each of the forward's, for the input's and for the weights'
    gradient. Recomputation is not counted, nor what a causal kernel computes beyond the mask.
    """
    num_keys = (seq_len + 1) / 2
    forward = forward_flops(config, num_keys)
    if with_mtp:
        forward += 2 * mtp_multiplied_parameters(config)
        forward += config.num_nextn_predict_layers * attention_flops(config, num_keys)
    return 3 * forward


def original_context(config: ModelConfig) -> int:
    """Tokens of the sequences that the model is trained on before its context is extended."""
    yarn = config.rope_scaling
    if yarn is None:
        return config.max_position_embeddings
    return min(yarn.original_max_position_embeddings, config.max_position_embeddings)


def _attention(config: ModelConfig) -> int:
    weights = sum(out * into for out, into in attention_projections(config).values())
    return weights + attention_biases(config)


def _moe_layer(config: ModelConfig) -> dict[str, int]:
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return {
        "routed_experts": config.n_routed_experts * expert,
        "shared_experts": config.n_shared_experts * expert,
        "router": config.n_routed_experts * config.hidden_size,
    }


def _layer_norms(config: ModelConfig) -> int:
    latents = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0)
    return 2 * config.hidden_size + latents
