"""The model against transformers' DeepseekV3ForCausalLM, over every choice that the
architecture leaves.

Both sides are built from one config.json. Choices of experts are replayed from theirs.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from support.config_json import MSCALES, Case, cases, examples
from support.models import tiny_config, training_context
from support.parity import (
    TheirRouting,
    choice_gap,
    float64_inside,
    gradients,
    pair,
    same_choices,
    their_gradients,
    worst_gradient,
    worst_logit,
)
from torch import Tensor

from dualray.model.config import YarnConfig
from dualray.model.context import RoutingTape
from dualray.model.hugging_face import is_interleaved, to_hugging_face
from dualray.model.init import logical_tensors
from dualray.model.stage import IGNORED_LABEL, Stage

pytestmark = [
    pytest.mark.parity,
    # transformers without shared experts has layers of width 0.
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one side computes: (T, vocab) logits, mean loss in nats, gradients by logical name."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]
    choices: dict[int, Tensor]


def tokens(case: Case, vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids and labels (T); about every fifth label is ignored."""
    generator = torch.Generator().manual_seed(case.seed)
    T = sum(case.seq_lens)
    ids, labels = torch.randint(vocab_size, (2, T), generator=generator)
    ignored = torch.rand(T, generator=generator) < 0.2
    ignored[case.seq_lens[0] - 1] = False
    return ids, labels.masked_fill(ignored, IGNORED_LABEL)


def run_ours(
    stage: Stage, case: Case, ids: Tensor, labels: Tensor, replay: dict[int, Tensor] | None = None
) -> Outcome:
    """All sequences packed, with the recorded routing or their own."""
    tape = RoutingTape(replay or {}, replay=replay is not None)
    ctx = training_context(stage.config, case.seq_lens, tape=tape)
    ctx.positions_T = ctx.positions_T + case.first_position
    stage.zero_grad()
    hidden = stage(stage.embed(ids, ctx), ctx)
    loss = stage.losses(hidden, labels[None], ctx, with_mtp=False).main / count(labels)
    loss.backward()
    return Outcome(
        logits=stage.logits(hidden, ctx).detach(),
        loss=loss.detach(),
        grads=gradients(stage),
        choices=tape.choices,
    )


def run_theirs(
    model: Any, stage: Stage, case: Case, ids: Tensor, labels: Tensor
) -> tuple[Outcome, TheirRouting]:
    """Sequence by sequence, with transformers' own loss, which is float32 whatever the model."""
    routing = TheirRouting()
    outputs = []
    with routing.recording(enumerate(model.model.layers)):
        for piece, wanted in zip(ids.split(case.seq_lens), labels.split(case.seq_lens)):
            places = torch.arange(len(piece)) + case.first_position
            outputs.append(
                model(
                    piece[None],
                    position_ids=places[None],
                    labels=wanted[None],
                    shift_labels=wanted[None],
                    num_items_in_batch=count(labels),
                    use_cache=False,
                )
            )
    logits = torch.cat([output.logits[0] for output in outputs])
    if logits.dtype == torch.float64:
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
    else:
        loss = torch.stack([output.loss for output in outputs]).sum()
    model.zero_grad()
    loss.backward()
    grads = their_gradients(
        model.named_parameters(), stage.config, interleaved=is_interleaved(case.settings)
    )
    outcome = Outcome(
        logits=logits.detach(), loss=loss.detach(), grads=grads, choices=routing.choices
    )
    return outcome, routing


def count(labels: Tensor) -> int:
    return int((labels != IGNORED_LABEL).sum())


@examples(250)
@given(case=cases())
def test_fp32(case: Case) -> None:
    stage, model = pair(case.settings, case.seed, torch.float32)
    ids, labels = tokens(case, stage.config.vocab_size)
    theirs, routing = run_theirs(model, stage, case, ids, labels)
    ours = run_ours(stage, case, ids, labels, routing.choices)
    assert worst_logit(ours.logits, theirs.logits) < 1e-5
    assert (ours.loss - theirs.loss).abs() <= 1e-6 * theirs.loss
    # One expert alone may have seen one token, and sum next to nothing: see float64.
    assert worst_gradient(ours.grads, theirs.grads, stacked=True) < 1e-5
    free = run_ours(stage, case, ids, labels)
    if same_choices(free.choices, routing, stage.config):
        assert worst_logit(free.logits, theirs.logits) < 1e-5


@examples(250)
@given(case=cases())
def test_fp64(case: Case) -> None:
    """What no rounding hides: every logical tensor's gradient, and the same choices unrecorded."""
    assert_equal_in_float64(case)


@pytest.mark.parametrize("turns", [{}, {"beta_fast": 4, "beta_slow": 16}], ids=["", "few-turns"])
@pytest.mark.parametrize("mscale", MSCALES)
@pytest.mark.parametrize("mscale_all_dim", MSCALES)
def test_yarn(mscale: float | None, mscale_all_dim: float | None, turns: dict[str, float]) -> None:
    """Every combination of the coefficients; a context shorter than a turn has an empty ramp."""
    yarn = {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    yarn = {key: value for key, value in yarn.items() if value is not None} | turns
    yarn |= {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 3}
    config = tiny_config(num_nextn_predict_layers=0, qk_rope_head_dim=8)
    plain = to_hugging_face(config, torch.float64)
    settings = plain | {"rope_scaling": yarn}
    assert_equal_in_float64(Case(settings=settings, seq_lens=(17, 9), first_position=0, seed=0))


def assert_equal_in_float64(case: Case) -> None:
    stage, model = pair(case.settings, case.seed, torch.float64)
    ids, labels = tokens(case, stage.config.vocab_size)
    with float64_inside():
        theirs, routing = run_theirs(model, stage, case, ids, labels)
    ours = run_ours(stage, case, ids, labels)
    assert same_choices(ours.choices, routing, stage.config)
    assert worst_logit(ours.logits, theirs.logits) < 1e-12
    assert (ours.loss - theirs.loss).abs() <= 1e-12 * theirs.loss
    assert worst_gradient(ours.grads, theirs.grads) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_long_sequences(dtype: torch.dtype) -> None:
    """Long enough for attention in strips, two of one length, all beyond the first context."""
    yarn = YarnConfig(factor=8.0, original_max_position_embeddings=16, mscale_all_dim=1.0)
    config = tiny_config(num_nextn_predict_layers=0, rope_scaling=yarn)
    case = Case(
        settings=to_hugging_face(config, dtype), seq_lens=(150, 150, 97), first_position=3, seed=0
    )
    stage, model = pair(case.settings, case.seed, dtype)
    ids, labels = tokens(case, config.vocab_size)
    exact = dtype == torch.float64
    with float64_inside() if exact else nullcontext():
        theirs, routing = run_theirs(model, stage, case, ids, labels)
    ours = run_ours(stage, case, ids, labels, routing.choices)
    assert worst_logit(ours.logits, theirs.logits) < (1e-12 if exact else 1e-5)
    wrong = worst_gradient(ours.grads, theirs.grads, stacked=not exact)
    assert wrong < (1e-12 if exact else 1e-5)


def test_bf16_is_as_near_to_fp32_as_theirs() -> None:
    """Root mean square over models whose tokens visit all experts, since choices would flip."""
    wrong = {"ours": 0.0, "theirs": 0.0}
    for seed in range(4):
        config = tiny_config(
            num_nextn_predict_layers=0,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=8,
            attention_bias=seed % 2 == 1,
        )
        case = Case(
            settings=to_hugging_face(config, torch.bfloat16),
            seq_lens=(40, 100),
            first_position=0,
            seed=seed,
        )
        stage, model = pair(case.settings, seed, torch.bfloat16)
        ids, labels = tokens(case, config.vocab_size)
        exact = Stage(config)
        for name, view in logical_tensors(exact).items():
            view.copy_(logical_tensors(stage)[name])
        expected = run_ours(exact, case, ids, labels).logits
        outputs = {
            "ours": run_ours(stage, case, ids, labels).logits,
            "theirs": run_theirs(model, stage, case, ids, labels)[0].logits,
        }
        for side, logits in outputs.items():
            assert logits.dtype == torch.bfloat16
            wrong[side] += (logits.float() - expected).square().mean().item()
    assert 0 < wrong["theirs"] ** 0.5 < 0.1
    assert wrong["ours"] ** 0.5 <= 1.2 * wrong["theirs"] ** 0.5


def test_choice_gap() -> None:
    """Groups of two experts score 1.5, 1.1 and 1.3, and two groups are open."""
    config = tiny_config(n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3)
    biased = torch.tensor([0.8, 0.7, 1.0, 0.1, 0.9, 0.4])
    # Experts 0, 4 and 1 of groups 0 and 2; expert 5 is 0.3 behind, group 1 is 0.2 behind.
    assert choice_gap(biased, config) == pytest.approx(0.2)
    assert choice_gap(torch.tensor([0.8, 0.45, 1.0, 0.0, 0.9, 0.4]), config) == pytest.approx(0.05)
    free = tiny_config(n_routed_experts=6, n_group=1, topk_group=1, num_experts_per_tok=6)
    assert choice_gap(biased, free) == float("inf")


def test_only_near_ties_may_differ() -> None:
    config = tiny_config(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1)
    routing = TheirRouting()
    routing.choices = {1: torch.tensor([[0], [2]]), 2: torch.tensor([[0], [1]])}
    routing.biased = dict.fromkeys(
        (1, 2), torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.1, 0.6, 0.6, 0.2]])
    )
    agreeing = {1: torch.tensor([[0], [2]]), 2: torch.tensor([[0], [1]])}
    assert same_choices(agreeing, routing, config)
    # Token 1 of layer 1 is a tie; layer 2 is behind it.
    assert not same_choices(agreeing | {1: torch.tensor([[0], [1]])}, routing, config)
    with pytest.raises(AssertionError, match=r"layer 2, token 0: a gap of 0\.6"):
        same_choices(agreeing | {2: torch.tensor([[3], [1]])}, routing, config)
