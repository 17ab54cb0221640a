"""Four attentions side by side: same parameters, same data, same steps.

MHA, GQA, MQA and MLA in otherwise equal models, as arXiv 2405.04434 compares them (sections
2.1.4 and D): MLA's latent is four head widths and its shared rotary key half of one, so that it
caches about as much as GQA with 2.25 groups. What a kind saves in attention goes into the FFN,
so that all have the same parameters within 2 %. Every layer is dense: total and active
parameters are then the same too, and no routing adds noise of its own.

The four take their training steps in turn, so that a machine that slows down slows all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dualray.data.dataset import TokenDataset
from dualray.data.loader import IGNORED, Loader
from dualray.data.yardsticks import bits_per_byte
from dualray.model.attention import CausalAttention
from dualray.model.config import ModelConfig
from dualray.model.context import ForwardContext
from dualray.model.formulas import parameter_count
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage
from dualray.parallel.lr import LrConfig, lr_at
from dualray.parallel.optimizer import OptimizerConfig
from dualray.platform.bench.training import DualrayTrainer

KINDS = ("mha", "gqa", "mqa", "mla")
GROUP_SIZE = 4
"""Query heads that share a key/value head in `gqa`."""
TOLERANCE = 0.02
"""How far the parameters of two kinds may lie apart, as a share."""
_WIDTH_STEP = 8  # the kernels like FFNs of a multiple of 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained and what is decoded."""

    base: ModelConfig
    """The `mha` model, all layers dense; the vocabulary is the corpus's."""
    seq_len: int
    """Tokens per training sequence."""
    batch_size: int
    """Sequences per step."""
    lr: LrConfig
    """Steps and learning rates."""
    contexts: tuple[int, ...]
    """Contexts in tokens at which a step of decoding is timed, ascending."""
    decode_batch: int
    """Sequences that decode together."""
    repeats: int
    """Timed steps of decoding per context and kind."""


def _base(
    *, hidden: int, ffn: int, layers: int, heads: int, width: int, context: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=1,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=heads,
        attention="mha",
        qk_nope_head_dim=0,
        qk_rope_head_dim=width,
        v_head_dim=width,
        max_position_embeddings=context,
        initializer_range=0.02,
        # There is no layer with experts; these only have to be numbers.
        moe_intermediate_size=8,
        n_routed_experts=1,
        num_experts_per_tok=1,
    )


FULL = Workload(
    base=_base(hidden=192, ffn=512, layers=4, heads=8, width=32, context=2048),
    seq_len=256,
    batch_size=16,
    lr=LrConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20, steps=200),
    contexts=(256, 2048),
    decode_batch=8,
    repeats=15,
)
"""2.8M parameters with a vocabulary of 2048; 0.8M tokens a kind, some 9 minutes on 2 cores."""

QUICK = Workload(
    base=_base(hidden=64, ffn=128, layers=2, heads=8, width=8, context=256),
    seq_len=64,
    batch_size=8,
    lr=LrConfig(lr=3e-3, min_lr=3e-4, warmup_steps=4, steps=40),
    contexts=(64, 256),
    decode_batch=4,
    repeats=5,
)
"""Seconds: shows that everything works, and nothing about attention."""


def make_models(base: ModelConfig, vocab_size: int) -> dict[str, ModelConfig]:
    """The four architectures by kind, with the parameters of the `mha` one."""
    base = replace(base, vocab_size=vocab_size)
    total = parameter_count(base).total
    return {kind: with_parameters(variant(base, kind), total) for kind in KINDS}


def variant(base: ModelConfig, kind: str) -> ModelConfig:
    """The `mha` model `base` with another attention and else the same widths."""
    width = base.v_head_dim
    if kind == "mla":
        return replace(
            base,
            attention=kind,
            kv_lora_rank=4 * width,
            qk_nope_head_dim=width,
            qk_rope_head_dim=width // 2,
        )
    groups = base.num_attention_heads // GROUP_SIZE if kind == "gqa" else None
    return replace(base, attention=kind, num_key_value_heads=groups)


def with_parameters(config: ModelConfig, total: int) -> ModelConfig:
    """The dense model `config` with the FFN width that brings it nearest to `total` parameters."""
    assert config.first_k_dense_replace == config.num_hidden_layers, "experts would change too"
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    spare = total - parameter_count(config).total
    width = config.intermediate_size + spare / per_unit
    fitted = replace(config, intermediate_size=_WIDTH_STEP * round(width / _WIDTH_STEP))
    off = abs(parameter_count(fitted).total / total - 1)
    assert off <= TOLERANCE, f"{config.attention} differs by {off:.1%} in parameters"
    return fitted


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One kind after its training."""

    config: ModelConfig
    stage: Stage
    losses: tuple[float, ...]
    """Mean nats a token of every step."""
    step_s: float
    """Seconds of a step, the median."""


def train(
    workload: Workload,
    dataset: TokenDataset,
    *,
    on_step: Callable[[int], None] = lambda done: None,
) -> dict[str, Trained]:
    """Train all kinds, one step of each in turn. Raises DataError if the corpus is too short."""
    models = make_models(workload.base, dataset.vocab_size)
    loader = Loader(dataset, seed=0, seq_len=workload.seq_len, depths=0)
    optimizer = OptimizerConfig(kind="adamw")
    trainers = {
        kind: DualrayTrainer(config, torch.float32, optimizer) for kind, config in models.items()
    }
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(workload.lr.steps):
        tokens = loader.sequences(step, 0, workload.batch_size, workload.batch_size)
        ids, labels = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.labels[0])
        for kind, trainer in trainers.items():
            started = time.perf_counter()
            losses[kind].append(trainer.step(ids, labels, lr_at(step, workload.lr)))
            seconds[kind].append(time.perf_counter() - started)
        on_step(step + 1)
    return {
        kind: Trained(
            config=models[kind],
            stage=trainer.stage,
            losses=tuple(losses[kind]),
            step_s=statistics.median(seconds[kind]),
        )
        for kind, trainer in trainers.items()
    }


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The loss over the whole held-out text."""

    nats_per_token: float
    bits_per_byte: float
    """Does not depend on the tokenizer."""


@torch.no_grad()
def evaluate(stage: Stage, dataset: TokenDataset, workload: Workload) -> HeldOut:
    """Held-out loss in windows of the training's length."""
    loader = Loader(dataset, seed=0, seq_len=workload.seq_len, depths=0)
    batch = workload.batch_size
    total, targets = 0.0, 0
    for number in range(loader.num_batches(batch)):
        tokens = loader.sequences(number, 0, batch, batch, split="heldout")
        labels = torch.from_numpy(tokens.labels).flatten(1)
        ctx = ForwardContext(
            positions_T=torch.arange(workload.seq_len).repeat(batch),
            seq_lens=(workload.seq_len,) * batch,
            attention=CausalAttention(),
            dispatch=LocalDispatch(stage.config.n_routed_experts),
        )
        hidden_TD = stage(stage.embed(torch.from_numpy(tokens.ids).flatten(), ctx), ctx)
        total += float(stage.losses(hidden_TD, labels, ctx, with_mtp=False).main)
        targets += int((labels != IGNORED).sum())
    split = dataset.split("heldout")
    bytes_per_target = split.num_bytes / (split.num_tokens - 1)
    return HeldOut(
        nats_per_token=total / targets,
        bits_per_byte=bits_per_byte(total, targets * bytes_per_target),
    )
