"""The layers that `bench experts` times: ours, transformers', naive permutes, the products alone.

Each is called with one `Batch` and does a forward and a backward: gradients of the tokens, of the
gates and of the weights. The router and the shared experts are in none of them.
T tokens, K choices, E experts, D model, F expert width, G = 2F, N = T*K rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualray.model.config import ModelConfig
from dualray.model.context import Routing
from dualray.model.hugging_face import to_hugging_face
from dualray.model.moe import Experts, LocalDispatch
from dualray.parallel.weight_grads import WeightGrads, attach_main_grads
from dualray.platform.bench.hugging_face import import_transformers

HUGGING_FACE_WAYS = ("grouped_mm", "eager")
"""Of transformers' ways. `batched_mm` copies the weights of an expert for each of its rows, 8.6 GB
at full size in fp32, and the others want a GPU and kernels from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What goes in: x_TD and gates_TK are leaves, gates in at least fp32, as both routers give."""

    x_TD: Tensor
    experts_TK: Tensor
    gates_TK: Tensor
    dy_TD: Tensor

    def forget(self) -> None:
        self.x_TD.grad = self.gates_TK.grad = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """gate_up_EGD and down_EDF of all experts."""

    gate_up_EGD: Tensor
    down_EDF: Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of the phases of our layer, forward and backward."""

    dispatch_s: float
    experts_s: float
    combine_s: float
    padding: float
    """Rows of padding in all rows that the experts compute."""

    @property
    def bookkeeping(self) -> float:
        """The share of what is not experts' arithmetic, which that on padding is not either."""
        arithmetic_s = self.experts_s * (1 - self.padding)
        return 1 - arithmetic_s / (self.dispatch_s + self.experts_s + self.combine_s)


class DualrayLayer:
    """As a worker trains it: weight gradients go through a sink into fp32 sums."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._experts = Experts(config, tuple(range(config.n_routed_experts)))
        self._experts.to(weights.down_EDF)
        with torch.no_grad():
            self._experts.gate_up_proj.copy_(weights.gate_up_EGD)
            self._experts.down_proj.copy_(weights.down_EDF)
        self._sums = attach_main_grads(self._experts.parameters())
        self._dispatch = LocalDispatch(config.n_routed_experts)
        self._sink = WeightGrads()

    def __call__(self, batch: Batch) -> Tensor:
        dispatched = self._dispatch.dispatch(0, batch.x_TD, _routing(batch))
        rows = self._experts(dispatched.rows_ND, dispatched.offsets, self._sink)
        out = self._dispatch.combine(rows, dispatched)
        out.backward(batch.dy_TD)
        return out.detach()

    def forget(self) -> None:
        self._sums.zero_()

    def weight_grads(self) -> tuple[Tensor, Tensor]:
        grads = [p.main_grad for p in self._experts.parameters()]  # pyrefly: ignore
        return grads[0], grads[1]

    def parts(self, batch: Batch) -> Parts:
        """The same once more, cut between the phases, whose times are taken one by one."""
        watch = _Watch(batch.x_TD.device)
        dispatched = self._dispatch.dispatch(0, batch.x_TD, _routing(batch))
        rows = dispatched.rows_ND.detach().requires_grad_()
        dispatch_s = watch.lap()
        y = self._experts(rows, dispatched.offsets, self._sink)
        cut = y.detach().requires_grad_()
        experts_s = watch.lap()
        self._dispatch.combine(cut, dispatched).backward(batch.dy_TD)
        combine_s = watch.lap()
        y.backward(cut.grad)
        experts_s += watch.lap()
        dispatched.rows_ND.backward(rows.grad)
        dispatch_s += watch.lap()
        return Parts(
            dispatch_s=dispatch_s,
            experts_s=experts_s,
            combine_s=combine_s,
            padding=1 - batch.experts_TK.numel() / len(rows),
        )


class HuggingFaceLayer:
    """transformers' `DeepseekV3Experts`: from tokens, choices and gates to the summed output."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        transformers = import_transformers()
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

        settings = to_hugging_face(config, weights.down_EDF.dtype)
        self._config = transformers.DeepseekV3Config.from_dict(settings)
        self._experts: Any = theirs.DeepseekV3Experts(self._config).to(weights.down_EDF)
        with torch.no_grad():
            self._experts.gate_up_proj.copy_(weights.gate_up_EGD)
            self._experts.down_proj.copy_(weights.down_EDF)
        self.use(HUGGING_FACE_WAYS[0])

    def use(self, way: str) -> None:
        """Which of transformers' implementations computes the experts."""
        self._config._experts_implementation = way

    def __call__(self, batch: Batch) -> Tensor:
        out = self._experts(batch.x_TD, batch.experts_TK, batch.gates_TK)
        out.backward(batch.dy_TD)
        return out.detach()

    def forget(self) -> None:
        self._experts.zero_grad(set_to_none=True)

    def weight_grads(self) -> tuple[Tensor, Tensor]:
        return self._experts.gate_up_proj.grad, self._experts.down_proj.grad


class NaiveLayer:
    """`grouped_mm` between an `index_select` and an `index_add`, with plain autograd."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._num_experts = config.n_routed_experts
        self._gate_up = weights.gate_up_EGD.detach().clone().requires_grad_()
        self._down = weights.down_EDF.detach().clone().requires_grad_()

    def __call__(self, batch: Batch) -> Tensor:
        key_N = batch.experts_TK.flatten()
        order_N = key_N.argsort(stable=True)
        token_N = order_N // batch.experts_TK.shape[1]
        counts = torch.zeros_like(key_N[:1]).expand(self._num_experts).contiguous()
        counts.scatter_add_(0, key_N, torch.ones_like(key_N))
        offsets = counts.cumsum(0).to(torch.int32)
        rows_ND = batch.x_TD.index_select(0, token_N)
        gate_up = F.grouped_mm(rows_ND, self._gate_up.transpose(1, 2), offs=offsets)
        gate, up = gate_up.chunk(2, dim=-1)
        y_ND = F.grouped_mm(F.silu(gate) * up, self._down.transpose(1, 2), offs=offsets)
        gate_N = batch.gates_TK.flatten().index_select(0, order_N).to(y_ND.dtype)
        out = torch.zeros_like(batch.x_TD).index_add(0, token_N, y_ND * gate_N[:, None])
        out.backward(batch.dy_TD)
        return out.detach()

    def forget(self) -> None:
        self._gate_up.grad = self._down.grad = None

    def weight_grads(self) -> tuple[Tensor, Tensor]:
        assert self._gate_up.grad is not None
        assert self._down.grad is not None
        return self._gate_up.grad, self._down.grad


class BareProducts:
    """The six grouped products of a forward and a backward over a batch's rows, and nothing else.

    Their inputs lie ready, and are not what the layer would compute.
    """

    def __init__(self, weights: Weights, num_rows: int) -> None:
        self._weights = weights
        like, F2 = weights.down_EDF, weights.gate_up_EGD.shape[1]
        self._model_ND = torch.randn(num_rows, like.shape[1], device=like.device).to(like.dtype)
        self._wide_NG = torch.randn(num_rows, F2, device=like.device).to(like.dtype)
        self._hidden_NF = self._wide_NG[:, : F2 // 2].contiguous()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> None:
        gate_up, down = self._weights.gate_up_EGD, self._weights.down_EDF
        x, wide, hidden = self._model_ND, self._wide_NG, self._hidden_NF
        counts = torch.bincount(batch.experts_TK.flatten(), minlength=len(down))
        offsets = counts.cumsum(0).to(torch.int32)
        F.grouped_mm(x, gate_up.transpose(1, 2), offs=offsets)
        F.grouped_mm(hidden, down.transpose(1, 2), offs=offsets)
        F.grouped_mm(x, down, offs=offsets)
        F.grouped_mm(x.t(), hidden, offs=offsets)
        F.grouped_mm(wide, gate_up, offs=offsets)
        F.grouped_mm(wide.t(), x, offs=offsets)

    def forget(self) -> None:
        pass


class _Watch:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last one."""
        last, self._last = self._last, self._now()
        return self._last - last


def timed(side: DualrayLayer | HuggingFaceLayer | NaiveLayer | BareProducts, batch: Batch) -> float:
    """Seconds of a forward and a backward, with gradients that were cleared before."""
    side.forget()
    batch.forget()
    watch = _Watch(batch.x_TD.device)
    side(batch)
    return watch.lap()


def _routing(batch: Batch) -> Routing:
    # Nobody reads the scores: there is no balance loss here.
    return Routing(
        experts_TK=batch.experts_TK, gates_TK=batch.gates_TK, scores_TE=batch.gates_TK.detach()
    )
