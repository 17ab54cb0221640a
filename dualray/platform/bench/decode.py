"""How fast one process decodes at a given context: the server's own path, without a server.

A step decodes one token of every sequence over a paged cache that holds real text. It is run
again and again at the same position, which overwrites the same cache rows with the same values,
so that the context stays what it is.
"""

from __future__ import annotations

import time

import numpy as np

from dualray.data.dataset import TokenDataset
from dualray.errors import DataError
from dualray.inference.block_pool import blocks_for
from dualray.inference.plan import Sampled, SampleSpec, SequencePlan
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage

BLOCK_SIZE = 16
_PREFILL_TOKENS = 256  # of one sequence at a time, which bounds the scores in memory


class Decoder:
    """A whole model whose cache holds the rows of `ids_BS`; a step decodes one token of each.

    `compiled` steps take a minute to prepare.
    """

    def __init__(self, stage: Stage, ids_BS: np.ndarray, *, compiled: bool = False) -> None:
        sequences, length = ids_BS.shape
        self._ids = ids_BS.tolist()
        blocks = blocks_for(length, BLOCK_SIZE)
        self._tables = [
            tuple(range(index * blocks, (index + 1) * blocks)) for index in range(sequences)
        ]
        self._runner = StageRunner(
            stage,
            LocalDispatch(stage.config.n_routed_experts),
            num_blocks=sequences * blocks,
            block_size=BLOCK_SIZE,
            compile_batch=sequences if compiled else 0,
        )
        for index in range(sequences):
            for first in range(0, length, _PREFILL_TOKENS):
                part = self._plan(index, first, min(first + _PREFILL_TOKENS, length))
                self._runner.run([part], None)

    def step(self, context: int) -> tuple[float, list[Sampled]]:
        """Seconds of one decoding step of all sequences that see `context` tokens each."""
        plans = [
            self._plan(index, context - 1, context, samples=True) for index in range(len(self._ids))
        ]
        started = time.perf_counter()
        sampled = self._runner.run(plans, None).sampled
        return time.perf_counter() - started, sampled

    def _plan(self, index: int, first: int, stop: int, *, samples: bool = False) -> SequencePlan:
        greedy = SampleSpec(
            position=stop, seed=0, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, logprobs=None
        )
        return SequencePlan(
            request_id=str(index),
            ids=tuple(self._ids[index][first:stop]),
            first_position=first,
            block_table=self._tables[index],
            samples=(greedy,) if samples else (),
        )


def heldout_ids(dataset: TokenDataset, sequences: int, length: int) -> np.ndarray:
    """(sequences, length) tokens of the held-out text, from evenly spread places.

    Raises DataError where there are fewer than `length`.
    """
    available = dataset.split("heldout").num_tokens
    if available < length:
        raise DataError(
            f"the held-out split of {dataset.folder} has {available} tokens and a context of "
            f"{length} is to be decoded",
            hint="give a larger corpus",
        )
    starts = np.linspace(0, available - length, sequences).astype(int)
    return np.stack([dataset.tokens("heldout", int(start), length) for start in starts])


def time_in_turn(
    decoders: dict[str, Decoder], context: int, *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of each decoder, in turn, after `warmup` unmeasured ones."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(warmup + repeats):
        for name, decoder in decoders.items():
            taken, _ = decoder.step(context)
            if number >= warmup:
                seconds[name].append(taken)
    return seconds
