"""Both sides of a parity test: our model and transformers', with the same numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from dualray.model.config import ModelConfig
from dualray.model.hugging_face import from_hugging_face, rotary_rows
from dualray.model.init import logical_slices, logical_tensors
from dualray.model.stage import Stage
from dualray.platform.bench.hugging_face import logical_views, new_model


@torch.no_grad()
def fill(stage: Stage, seed: int) -> None:
    """Weights that keep signals of about order one; no norm, bias or correction bias is trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, view in logical_tensors(stage).items():
        values = torch.randn(view.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            view.copy_(values * 0.2)
        elif name.endswith("bias"):
            view.copy_(values * 0.3)
        elif name.endswith("norm.weight"):
            view.copy_(1 + 0.2 * values)
        else:
            view.copy_(values * 0.7 * view.shape[-1] ** -0.5)


def new_stage(config: ModelConfig, dtype: torch.dtype, seed: int) -> Stage:
    """Our model, filled; the correction bias is never below fp32."""
    stage = Stage(config).to(dtype)
    for name, buffer in stage.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.to(torch.promote_types(dtype, torch.float32))
    fill(stage, seed)
    return stage


def pair(settings: Mapping[str, Any], seed: int, dtype: torch.dtype) -> tuple[Stage, Any]:
    """Our model and transformers' of one config.json, the latter on its plainest paths."""
    stage = new_stage(from_hugging_face(settings), dtype, seed)
    return stage, new_model(
        stage.config, stage, settings=settings, attention="eager", experts="eager"
    )


@contextmanager
def float64_inside() -> Iterator[None]:
    """transformers casts to float32 in norms, router, softmax and angles; not in here.

    Its module sees a `torch` whose float32 is float64, so that what it computes can be held
    against ours to the last digits.
    """

    class Torch(ModuleType):
        float32 = float = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_deepseek_v3, "torch", Torch("torch"))
        yield


def gradients(stage: Stage) -> dict[str, Tensor]:
    """Gradients of our parameters by logical name."""
    parameters = dict(stage.named_parameters())
    parts = {}
    for name, slices in logical_slices(stage).items():
        if name in parameters:
            grad = parameters[name].grad
            assert grad is not None, f"{name} has no gradient"
            for part in slices:
                flat = grad.reshape(-1)[part.start : part.start + part.numel]
                parts[part.name] = flat.view(part.shape)
    return parts


def their_gradients(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: ModelConfig, *, interleaved: bool
) -> dict[str, Tensor]:
    """transformers' gradients by logical name, rotary rows in our order."""
    grads = {}
    for name, parameter in named_parameters:
        if parameter.numel():
            assert parameter.grad is not None, f"{name} has no gradient"
            grads[name] = parameter.grad
    views = logical_views(grads)
    for name, grad in views.items():
        rows = rotary_rows(config, name) if interleaved else None
        views[name] = grad if rows is None else grad[rows]
    return views


def worst_gradient(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, stacked: bool = False
) -> float:
    """The largest ||dg|| / ||g|| of any tensor; `stacked` takes a layer's experts as one.

    A gradient below a thousandth of all gradients' norm counts as that large: some are zero,
    such as that of a router whose single choice is normalised, but for rounding.
    """
    assert ours.keys() == theirs.keys()
    squares: dict[str, tuple[float, float]] = {}
    for name, grad in theirs.items():
        tensor = re.sub(r"\.experts\.\d+", ".experts", name) if stacked else name
        wrong, whole = squares.get(tensor, (0.0, 0.0))
        wrong += (ours[name] - grad).double().square().sum().item()
        squares[tensor] = wrong, whole + grad.double().square().sum().item()
    floor = 1e-6 * sum(whole for _, whole in squares.values())
    return max(wrong / max(whole, floor) for wrong, whole in squares.values()) ** 0.5


def worst_logit(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the logits' magnitude where that exceeds one."""
    return ((ours - theirs).abs().max() / theirs.square().mean().sqrt().clamp(min=1)).item()


class TheirRouting:
    """Choices and biased scores of transformers' routers, by layer, rows in call order."""

    def __init__(self) -> None:
        self.choices: dict[int, Tensor] = {}
        self.biased: dict[int, Tensor] = {}

    @contextmanager
    def recording(self, layers: Iterable[tuple[int, Any]]) -> Iterator[None]:
        """Of those of the numbered decoder layers that have a router."""
        handles = [
            layer.mlp.gate.register_forward_hook(self._hook(number))
            for number, layer in layers
            if hasattr(layer.mlp, "gate")
        ]
        yield
        for handle in handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def keep(router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, _, experts = output
            biased = logits.detach().sigmoid() + router.e_score_correction_bias
            for rows, more in ((self.choices, experts), (self.biased, biased)):
                rows[layer] = torch.cat((rows[layer], more)) if layer in rows else more

        return keep


def choice_gap(biased_E: Tensor, config: ModelConfig) -> float:
    """How far one token's biased scores are from choosing another expert or another group.

    The smaller of two margins: the last group taken over the first left out, and likewise
    the experts of the groups taken.
    """
    gap = float("inf")
    grouped_Ge = biased_E.unflatten(0, (config.n_group, -1))
    if config.topk_group < config.n_group:
        ranked, order = grouped_Ge.topk(2, dim=-1).values.sum(-1).sort(descending=True)
        gap = (ranked[config.topk_group - 1] - ranked[config.topk_group]).item()
        grouped_Ge = grouped_Ge[order[: config.topk_group]]
    ranked = grouped_Ge.flatten().sort(descending=True).values
    K = config.num_experts_per_tok
    if len(ranked) > K:
        gap = min(gap, (ranked[K - 1] - ranked[K]).item())
    return gap


def same_choices(ours: Mapping[int, Tensor], theirs: TheirRouting, config: ModelConfig) -> bool:
    """Whether all choices agree; fails if one differs that is no near-tie (a gap below 1e-5).

    Only the first layer in which some differ counts: those behind it see other inputs.
    """
    assert ours.keys() == theirs.choices.keys()
    for layer in sorted(ours):
        mine, other = (c.sort(dim=-1).values for c in (ours[layer], theirs.choices[layer]))
        rows = (mine != other).any(dim=-1).nonzero().flatten().tolist()
        for row in rows:
            gap = choice_gap(theirs.biased[layer][row], config)
            assert gap < 1e-5, f"layer {layer}, token {row}: a gap of {gap:g}"
        if rows:
            return False
    return True
