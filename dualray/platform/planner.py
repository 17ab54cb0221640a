"""What a model costs, figure by figure, each with the formula that it is computed from.

Pure: a configuration in, plain data out. A formula is written so that it can be checked by
hand: numbers, sums and products, and the names of figures above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualray.model import formulas
from dualray.model.config import ModelConfig

BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a plan."""

    name: str
    """What it is; other formulas refer to it by this."""
    value: float
    """In units of its group."""
    formula: str
    """How it comes about, in numbers and names of other figures."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `dualray plan` says about one model, in groups by unit."""

    name: str
    """The preset, or the run."""
    model: ModelConfig
    seq_len: int
    """Tokens of a training sequence."""
    contexts: tuple[int, ...]
    """Contexts in tokens at which decoding is counted."""
    groups: dict[str, tuple[Figure, ...]]
    """Figures by unit: `parameters`, `bytes`, `FLOPs a token`."""

    @property
    def figures(self) -> dict[str, Figure]:
        return {figure.name: figure for group in self.groups.values() for figure in group}


def make_plan(name: str, model: ModelConfig, seq_len: int | None = None) -> Plan:
    """The plan of a model, trained on sequences of `seq_len` tokens.

    By default those are of its original context, that is before any extension.
    """
    length = formulas.original_context(model) if seq_len is None else seq_len
    contexts = sorted({length, min(8 * length, model.max_position_embeddings)})
    if model.max_position_embeddings > 8 * length:
        contexts.append(model.max_position_embeddings)
    return Plan(
        name=name,
        model=model,
        seq_len=length,
        contexts=tuple(contexts),
        groups={
            "parameters": tuple(_parameters(model)),
            "bytes": tuple(_bytes(model)),
            "FLOPs a token": tuple(_flops(model, length, contexts)),
        },
    )


def _parameters(model: ModelConfig) -> Iterator[Figure]:
    parts = formulas.main_parameters(model)
    for part, formula in _part_formulas(model).items():
        yield Figure(name=_title(part), value=parts[part], formula=formula)
    count = formulas.parameter_count(model)
    yield Figure(name="total", value=count.total, formula=" + ".join(map(_title, parts)))
    unvisited = model.n_routed_experts - model.num_experts_per_tok
    unused = f"routed experts x {unvisited} / {model.n_routed_experts}"
    if not model.tie_word_embeddings:
        unused += " - embedding"
    yield Figure(name="active a token", value=count.active, formula=f"total - {unused}")
    multiplied = "active a token - norms"
    if model.attention_bias:
        multiplied += f" - {model.num_hidden_layers} x {formulas.attention_biases(model)}"
    yield Figure(
        name="in products", value=formulas.multiplied_parameters(model), formula=multiplied
    )
    if depths := model.num_nextn_predict_layers:
        yield from _mtp(model, depths)


def _mtp(model: ModelConfig, depths: int) -> Iterator[Figure]:
    mtp = formulas.mtp_parameters(model)
    D = model.hidden_size
    attention = _product(1, _attention(model))
    ffn = f"({_experts(model, model.n_routed_experts + model.n_shared_experts)} + {_router(model)})"
    layer = f"({attention} + {ffn} + {_layer_norms(model)} + 3 x {D})"
    own = sum(mtp.values())
    yield Figure(name="MTP layers", value=own - mtp["projection"], formula=_product(depths, layer))
    yield Figure(
        name="MTP projections", value=mtp["projection"], formula=_product(depths, f"{2 * D} x {D}")
    )
    yield Figure(name="MTP", value=own, formula="MTP layers + MTP projections")
    idle = _experts(model, model.n_routed_experts - model.num_experts_per_tok)
    unmultiplied = f"{idle} + {_layer_norms(model)} + 3 x {D}"
    if model.attention_bias:
        unmultiplied += f" + {formulas.attention_biases(model)}"
    yield Figure(
        name="MTP in products",
        value=formulas.mtp_multiplied_parameters(model),
        formula=f"MTP - {_product(depths, f'({unmultiplied})')} + "
        + _product(depths, f"{model.vocab_size} x {D}"),
    )


def _bytes(model: ModelConfig) -> Iterator[Figure]:
    if model.attention == "mla":
        values = f"({model.latent_rank} + {model.qk_rope_head_dim})"
    else:
        widths = f"({model.qk_head_dim} + {model.v_head_dim})"
        values = f"{model.key_value_heads} x {widths}"
    yield Figure(
        name="cache a token in BF16",
        value=formulas.cache_bytes_per_token(model, BF16_BYTES),
        formula=f"{model.num_hidden_layers} x {values} x {BF16_BYTES}",
    )
    count = formulas.parameter_count(model)
    yield Figure(
        name="weights in BF16",
        value=BF16_BYTES * (count.total + count.mtp),
        formula=f"{BF16_BYTES} x total" + (f" + {BF16_BYTES} x MTP" if count.mtp else ""),
    )


def _flops(model: ModelConfig, seq_len: int, contexts: list[int]) -> Iterator[Figure]:
    layers, heads = model.num_hidden_layers, model.num_attention_heads
    depths = model.num_nextn_predict_layers
    expanded = f"2 x {heads} x ({model.qk_head_dim} + {model.v_head_dim})"
    mean_keys = f"({seq_len} + 1) / 2"
    prefill = f"prefill of {seq_len} tokens"
    yield Figure(
        name=prefill,
        value=formulas.forward_flops(model, (seq_len + 1) / 2),
        formula=f"2 x in products + {layers} x {expanded} x {mean_keys}",
    )
    training = "training"
    yield Figure(
        name=training,
        value=formulas.training_flops(model, seq_len, with_mtp=False),
        formula=f"3 x {prefill}",
    )
    if depths:
        yield Figure(
            name="training with MTP",
            value=formulas.training_flops(model, seq_len),
            formula=f"{training} + 3 x (2 x MTP in products + "
            f"{_product(depths, expanded)} x {mean_keys})",
        )
    absorbed = expanded
    if model.attention == "mla":
        absorbed = f"2 x {heads} x ({model.cache_dim} + {model.latent_rank})"
    for context in contexts:
        yield Figure(
            name=f"decoding at {context} tokens",
            value=formulas.forward_flops(model, context, absorbed=True),
            formula=f"2 x in products + {layers} x {absorbed} x {context}",
        )


def _part_formulas(model: ModelConfig) -> dict[str, str]:
    """Formulas of `main_parameters`' parts, in its order."""
    D, layers, dense = model.hidden_size, model.num_hidden_layers, model.first_k_dense_replace
    vocabulary = f"{model.vocab_size} x {D}"
    moe = layers - dense
    return {
        "embedding": vocabulary,
        "head": "0" if model.tie_word_embeddings else vocabulary,
        "attention": _product(layers, _attention(model)),
        "dense_ffn": f"{dense} x 3 x {D} x {model.intermediate_size}",
        "routed_experts": _product(moe, _experts(model, model.n_routed_experts)),
        "shared_experts": _product(moe, _experts(model, model.n_shared_experts)),
        "router": _product(moe, _router(model)),
        "norms": f"{layers} x {_layer_norms(model)} + {D}",
    }


def _attention(model: ModelConfig) -> str:
    shapes = formulas.attention_projections(model).values()
    terms = [f"{out} x {into}" for out, into in shapes]
    if model.attention_bias:
        terms.append(str(formulas.attention_biases(model)))
    return f"({' + '.join(terms)})"


def _experts(model: ModelConfig, number: int) -> str:
    return f"{number} x 3 x {model.hidden_size} x {model.moe_intermediate_size}"


def _router(model: ModelConfig) -> str:
    return f"{model.n_routed_experts} x {model.hidden_size}"


def _layer_norms(model: ModelConfig) -> str:
    ranks = [rank for rank in (model.q_lora_rank, model.kv_lora_rank) if rank is not None]
    return f"({' + '.join([f'2 x {model.hidden_size}', *map(str, ranks)])})"


def _product(number: int, factor: str) -> str:
    return factor if number == 1 else f"{number} x {factor}"


def _title(part: str) -> str:
    return part.replace("dense_ffn", "dense FFN").replace("_", " ")
