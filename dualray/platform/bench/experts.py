"""The routed experts of one MoE layer beside transformers': dispatch, experts, combine.

Both sides take the same tokens, choices and gates, and give the output and all gradients; that
they do is checked before anything is timed. Sides take turns within a round, so that a machine
that slows down slows all, and ratios are taken round by round. With `fresh` routing every round
has choices of its own, as every step of a training has; with `repeated` all rounds have the same,
which spares bf16 on a CPU the compilation of kernels for row counts that were never seen.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dualray.errors import RunError
from dualray.model.config import ModelConfig
from dualray.platform.bench import training
from dualray.platform.bench.experts_sides import (
    HUGGING_FACE_WAYS,
    BareProducts,
    Batch,
    DualrayLayer,
    HuggingFaceLayer,
    NaiveLayer,
    Weights,
    timed,
)
from dualray.platform.bench.training import DTYPES

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative, by the norm of a tensor. Sums are made in another order, and in bf16 rounded to 8 bits
at other places: transformers weights and sums in fp32, ours weights in bf16."""

ROUTINGS = ("fresh", "repeated")
WARMUP = 2
_TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer and its batch."""

    model: ModelConfig
    """Of which the hidden size, the experts' width and number and the choices count."""
    tokens: int
    rounds: int
    """Measured, of each case."""
    threads: tuple[int, ...]
    """Numbers of torch threads on a CPU; more than there are cores are left out."""


def _workload(hidden: int, experts: int, tokens: int, rounds: int) -> Workload:
    model = replace(
        training.FULL.model,
        hidden_size=hidden,
        moe_intermediate_size=hidden,
        n_routed_experts=experts,
        num_experts_per_tok=4,
    )
    return Workload(model=model, tokens=tokens, rounds=rounds, threads=(1, 2))


FULL = _workload(hidden=256, experts=16, tokens=4096, rounds=15)
"""Some 2 minutes on 2 cores."""

QUICK = _workload(hidden=128, experts=16, tokens=1024, rounds=5)
"""Seconds; overheads weigh more than in `FULL`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one row of the result is about."""

    device: str
    dtype: str
    threads: int
    routing: str

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s'[: self.threads - 1]}"
        place = self.device if self.device == "cuda" else self.device + threads
        return f"{place}, {self.dtype}, {self.routing} routing"


def cases(workload: Workload, *, has_gpu: bool) -> list[Case]:
    """All cases that can run here: on the CPU, and on a GPU if there is one."""
    cores = len(os.sched_getaffinity(0))
    places = [("cpu", threads) for threads in workload.threads if threads <= cores]
    if has_gpu:
        places.append(("cuda", torch.get_num_threads()))
    return [
        Case(device=device, dtype=dtype, threads=threads, routing=routing)
        for device, threads in places
        for dtype in DTYPES
        for routing in ROUTINGS
    ]


def compare_experts(
    workload: Workload, *, on_case: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """One row a case. Raises ConfigError without transformers, RunError where sides disagree."""
    rows = []
    for case in cases(workload, has_gpu=torch.cuda.is_available()):
        on_case(str(case))
        with _threads(case.threads):
            rows.append(compare_case(workload, case))
    return rows


def compare_case(workload: Workload, case: Case) -> dict[str, Any]:
    """The row of one case; seconds of a forward and a backward, medians over rounds."""
    generator = torch.Generator().manual_seed(0)
    weights = new_weights(workload, case, generator)
    ours = DualrayLayer(workload.model, weights)
    theirs = HuggingFaceLayer(workload.model, weights)
    sides: dict[str, Any] = {
        "dualray": ours,
        "hugging_face": theirs,
        "bare": BareProducts(weights, workload.tokens * workload.model.num_experts_per_tok),
    }
    if case.device == "cuda":
        sides["naive"] = NaiveLayer(workload.model, weights)
    batch = new_batch(workload, case, generator)
    for name in sides.keys() - {"dualray", "bare"}:
        check(case, name, ours, sides[name], batch)
    way = choose_way(theirs, batch)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    parts = []
    for number in range(WARMUP + workload.rounds):
        if case.routing == "fresh":
            batch = new_batch(workload, case, generator)
        taken = {name: timed(side, batch) for name, side in sides.items()}
        if number >= WARMUP:
            for name, value in taken.items():
                seconds[name].append(value)
            ours.forget()
            batch.forget()
            parts.append(ours.parts(batch))
    shares = {
        "bookkeeping": statistics.median(part.bookkeeping for part in parts),
        "padding": statistics.median(part.padding for part in parts),
    }
    for phase in ("dispatch_s", "experts_s", "combine_s"):
        shares[phase] = statistics.median(getattr(part, phase) for part in parts)
    return _row(case, seconds) | {"hugging_face_experts": way} | shares


def new_weights(workload: Workload, case: Case, generator: torch.Generator) -> Weights:
    """Normal weights that keep the size of what passes through."""
    E, D = workload.model.n_routed_experts, workload.model.hidden_size
    width = workload.model.moe_intermediate_size
    tensors = [
        (torch.randn(shape, generator=generator) * shape[2] ** -0.5).to(
            case.device, DTYPES[case.dtype]
        )
        for shape in ((E, 2 * width, D), (E, D, width))
    ]
    return Weights(gate_up_EGD=tensors[0], down_EDF=tensors[1])


def new_batch(workload: Workload, case: Case, generator: torch.Generator) -> Batch:
    """Tokens with choices that are balanced but for chance, as a trained router's are."""
    T, D = workload.tokens, workload.model.hidden_size
    scores_TE = torch.rand(T, workload.model.n_routed_experts, generator=generator)
    gates_TK, experts_TK = scores_TE.topk(workload.model.num_experts_per_tok)
    gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
    x_TD, dy_TD = (torch.randn(T, D, generator=generator) for _ in range(2))
    place = (case.device, DTYPES[case.dtype])
    return Batch(
        x_TD=x_TD.to(*place).requires_grad_(),
        experts_TK=experts_TK.to(case.device),
        gates_TK=gates_TK.to(case.device).requires_grad_(),
        dy_TD=dy_TD.to(*place),
    )


def check(
    case: Case,
    name: str,
    ours: DualrayLayer,
    theirs: HuggingFaceLayer | NaiveLayer,
    batch: Batch,
) -> None:
    """Raises RunError unless both sides give the same output and gradients of one batch."""
    own, other = _results(ours, batch), _results(theirs, batch)
    for tensor, value in own.items():
        error = float((value - other[tensor]).norm() / other[tensor].norm())
        if not error <= TOLERANCE[case.dtype]:
            raise RunError(
                f"{case}: {tensor} differs by {error:.1e} between dualray and {name}, and may by "
                f"{TOLERANCE[case.dtype]:g}",
                hint="find which of the two computes something else before comparing their speed",
            )


def _results(side: DualrayLayer | HuggingFaceLayer | NaiveLayer, batch: Batch) -> dict[str, Tensor]:
    side.forget()
    batch.forget()
    out = side(batch)
    gate_up, down = side.weight_grads()
    assert batch.x_TD.grad is not None
    assert batch.gates_TK.grad is not None
    results = {
        "the output": out,
        "the tokens' gradient": batch.x_TD.grad,
        "the gates' gradient": batch.gates_TK.grad,
        "the gate and up weights' gradient": gate_up,
        "the down weights' gradient": down,
    }
    return {name: tensor.double().clone() for name, tensor in results.items()}


def choose_way(theirs: HuggingFaceLayer, batch: Batch) -> str:
    """Keep transformers' fastest way for this case, by the best of a few tries; its name."""
    seconds = {}
    for way in HUGGING_FACE_WAYS:
        theirs.use(way)
        seconds[way] = min(timed(theirs, batch) for _ in range(_TRIES))
    best = min(seconds, key=lambda way: seconds[way])
    theirs.use(best)
    return best


def _row(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": case.device,
        "dtype": case.dtype,
        "threads": case.threads,
        "routing": case.routing,
        "rounds": len(seconds["dualray"]),
    }
    for name, values in seconds.items():
        row[f"{name}_s"] = statistics.median(values)
    ratios = [b / a for a, b in zip(seconds["dualray"], seconds["hugging_face"])]
    row |= {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    if "naive" in seconds:
        naive = zip(seconds["dualray"], seconds["naive"])
        row["ratio_to_naive"] = statistics.median(b / a for a, b in naive)
    for name in ("dualray", "hugging_face"):
        pairs = zip(seconds["bare"], seconds[name])
        row[f"{name}_per_bare"] = statistics.median(b / a for a, b in pairs)
    return row


def config_dict(workload: Workload) -> dict[str, Any]:
    """The layer as a record stores it."""
    model = workload.model
    return {
        "hidden_size": model.hidden_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "n_routed_experts": model.n_routed_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "tokens": workload.tokens,
        "warmup": WARMUP,
        "without": "router, shared experts",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
