"""The peer of the serving benchmark: transformers' `generate` with our weights.

What people do without a server: one request after the other, or static batches, where all that
wait are padded to the longest prompt and run until the last of them has its tokens. Greedy, with
whichever of transformers' ways to run the experts is fastest for the size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dualray.model.config import ModelConfig
from dualray.model.init import initialise
from dualray.model.stage import Stage
from dualray.platform.bench.hugging_face import new_model
from dualray.platform.bench.serve_requests import BenchRequest

EXPERTS = ("grouped_mm", "batched_mm", "eager")
_TRIED_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What came, by request name, and the seconds from the first arrival to the last token."""

    ids: dict[str, tuple[int, ...]]
    seconds: float


class HuggingFaceGenerator:
    """transformers' model with the weights that `seed` gives."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        stage = Stage(config)
        initialise(stage, seed)
        self._model = new_model(config, stage).eval()
        # Every request has a fixed number of tokens, so nothing is looked for.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def choose_experts(self, requests: Sequence[BenchRequest]) -> str:
        """Keep the fastest way to run the experts of these as a batch; its name."""
        seconds = {}
        for name in EXPERTS:
            self._model.set_experts_implementation(name)
            self._generate(requests, 1)
            started = time.perf_counter()
            self._generate(requests, _TRIED_TOKENS)
            seconds[name] = time.perf_counter() - started
        best = min(seconds, key=lambda name: seconds[name])
        self._model.set_experts_implementation(best)
        return best

    def at_once(self, requests: Sequence[BenchRequest]) -> Generated:
        """All as one batch."""
        started = time.perf_counter()
        ids = self._generate(requests, max(request.max_tokens for request in requests))
        return Generated(ids=ids, seconds=time.perf_counter() - started)

    def as_they_come(self, requests: Sequence[BenchRequest], *, max_batch: int) -> Generated:
        """Whatever has arrived when the last batch is done, first come first served.

        With a `max_batch` of 1 one after the other.
        """
        started = time.perf_counter()
        waiting = list(requests)
        ids: dict[str, tuple[int, ...]] = {}
        while waiting:
            now_s = time.perf_counter() - started
            time.sleep(max(0.0, waiting[0].arrives_s - now_s))
            now_s = time.perf_counter() - started
            arrived = [request for request in waiting if request.arrives_s <= now_s]
            batch = arrived[:max_batch] or waiting[:1]
            del waiting[: len(batch)]
            ids |= self._generate(batch, max(request.max_tokens for request in batch))
        return Generated(ids=ids, seconds=time.perf_counter() - started)

    @torch.inference_mode()
    def _generate(
        self, requests: Sequence[BenchRequest], new_tokens: int
    ) -> dict[str, tuple[int, ...]]:
        """Each request's tokens, no more than it asked for; prompts are padded on the left."""
        width = max(len(request.prompt_ids) for request in requests)
        ids_BS = torch.zeros(len(requests), width, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for row, request in enumerate(requests):
            start = width - len(request.prompt_ids)
            ids_BS[row, start:] = torch.tensor(request.prompt_ids)
            mask_BS[row, start:] = 1
        out = self._model.generate(
            ids_BS, attention_mask=mask_BS, max_new_tokens=new_tokens, do_sample=False
        )
        rows = out[:, width:].tolist()
        return {r.name: tuple(row[: r.max_tokens]) for r, row in zip(requests, rows)}
