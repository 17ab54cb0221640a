"""Decoding beside Hugging Face's model: same weights, same prompts, steps in turn.

Both sides hold the context in a cache and choose greedily; Hugging Face's is cropped after
every step, so that the context stays what it is on both. It runs its experts in whichever of
its ways is fastest for the case. B sequences, S tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dualray.errors import RunError
from dualray.inference.plan import Sampled
from dualray.model.config import ModelConfig
from dualray.model.init import initialise
from dualray.model.stage import Stage
from dualray.platform.bench.decode import Decoder
from dualray.platform.bench.hugging_face import new_model

LOGPROB_TOLERANCE = {"fp32": 1e-3}
"""In nats, of the likeliest token. In bf16 near-ties of the router flip, so nothing is asked."""


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """What is decoded."""

    batch: int
    """Sequences that decode together."""
    context: int
    """Tokens that the new one sees, itself included."""
    compiled: bool = False
    """Our step is compiled; Hugging Face's never is."""


_EXPERTS = ("grouped_mm", "batched_mm", "eager")
_TRIES = 3


class HuggingFaceDecoder:
    """transformers' model with a key/value cache that holds all but the last of `ids_BS`."""

    def __init__(self, model: Any, ids_BS: np.ndarray) -> None:
        self._model = model.eval()
        ids = torch.from_numpy(ids_BS)
        self._last = ids[:, -1:]
        with torch.inference_mode():
            self._cache = self._forward(ids[:, :-1], None).past_key_values

    def _forward(self, ids_BS: torch.Tensor, cache: Any) -> Any:
        return self._model(ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def step(self) -> tuple[float, list[float]]:
        """Seconds of one step, and the log-probability of the likeliest token of each row."""
        started = time.perf_counter()
        logits = self._forward(self._last, self._cache).logits[:, -1]
        best = logits.argmax(-1, keepdim=True)
        seconds = time.perf_counter() - started
        self._cache.crop(-1)
        return seconds, logits.float().log_softmax(-1).gather(1, best).flatten().tolist()

    def choose_experts(self) -> str:
        """Keep the fastest way to run the experts, by the best of a few steps; its name."""
        seconds = {}
        for name in _EXPERTS:
            self._model.set_experts_implementation(name)
            self.step()
            seconds[name] = min(self.step()[0] for _ in range(_TRIES))
        best = min(seconds, key=lambda name: seconds[name])
        self._model.set_experts_implementation(best)
        return best


def compare_decoding(
    config: ModelConfig,
    dtype: tuple[str, torch.dtype],
    cases: list[DecodeCase],
    *,
    pairs: int,
    warmup: int = 3,
    on_case: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One row a case: median seconds a step on both sides, and the ratio over the pairs.

    Raises RunError if the log-probabilities of both sides disagree in fp32.
    """
    stage = Stage(config)
    initialise(stage, 0)
    stage.to(dtype[1])
    model = new_model(config, stage)
    rows = []
    for case in cases:
        words = f"{case.batch} x {case.context}" + (", compiled" if case.compiled else "")
        on_case(words)
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.context)
        ids_BS = torch.randint(config.vocab_size, shape, generator=generator).numpy()
        ours = Decoder(stage, ids_BS, compiled=case.compiled)
        model.set_experts_implementation(_EXPERTS[0])
        theirs = HuggingFaceDecoder(model, ids_BS)
        experts = theirs.choose_experts()
        times: list[tuple[float, float]] = []
        for number in range(warmup + pairs):
            own_s, sampled = ours.step(case.context)
            other_s, logprobs = theirs.step()
            if number == 0:
                _check(dtype[0], words, sampled, logprobs)
            if number >= warmup:
                times.append((own_s, other_s))
        rows.append(_row(dtype[0], case, experts, times))
    return rows


def _row(
    dtype: str, case: DecodeCase, experts: str, times: list[tuple[float, float]]
) -> dict[str, Any]:
    ratios = [theirs / ours for ours, theirs in times]
    own, other = (statistics.median(side) for side in zip(*times))
    return {
        "part": "decode",
        "dtype": dtype,
        "batch": case.batch,
        "context": case.context,
        "compiled": case.compiled,
        "dualray": {"median_step_s": own, "tokens_per_s": case.batch / own},
        "hugging_face": {
            "median_step_s": other,
            "tokens_per_s": case.batch / other,
            "experts": experts,
        },
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": len(ratios),
    }


def _check(dtype: str, case: str, sampled: list[Sampled], logprobs: list[float]) -> None:
    tolerance = LOGPROB_TOLERANCE.get(dtype)
    for one, theirs in zip(sampled, logprobs):
        if tolerance is not None and abs(one.logprob - theirs) > tolerance:
            raise RunError(
                f"decoding {case} in {dtype}, the likeliest token has a log-probability of "
                f"{one.logprob:.6f} in dualray and {theirs:.6f} in Hugging Face's model of the "
                f"same weights, and they may differ by {tolerance:g}",
                hint="find which of the two computes something else before comparing their speed",
            )
