"""What a decoding step costs by its rows, and what drafts add: at a fixed place, in turn.

Every shape of step runs again and again over the same cache rows, so that the context stays what
it is, and the shapes take turns, so that a busy moment hits all of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from dualray.inference.plan import Drafting, SampleSpec, SequencePlan
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch
from dualray.platform.bench.serve_trained import Trained

_BLOCK_SIZE = 16
SHAPES = ((1, 0), (2, 0), (4, 0), (1, 1), (2, 1), (4, 3))
"""(rows of a sequence, drafts that it asks for)."""


def step_costs(
    trained: Trained, *, batches: tuple[int, ...], threads: int, quick: bool, context: int = 128
) -> list[dict[str, Any]]:
    """A row for every batch size: median milliseconds of each shape, greedy, at `context`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [
            _costs(trained, batch, threads, 1 if quick else 40, 16 if quick else context)
            for batch in batches
        ]
    finally:
        torch.set_num_threads(before)


def _costs(
    trained: Trained, batch: int, threads: int, repeats: int, context: int
) -> dict[str, Any]:
    blocks = -(-(context + 8) // _BLOCK_SIZE)
    runner = StageRunner(
        trained.stage,
        LocalDispatch(trained.stage.config.n_routed_experts),
        num_blocks=batch * blocks,
        block_size=_BLOCK_SIZE,
        draft_modules=1,
    )
    ids = trained.dataset.tokens("heldout", 0, context + 8).tolist()
    steps = {shape: _plans(batch, ids, context, blocks, *shape) for shape in SHAPES}
    prompt = [_plan(index, ids[:context], 0, blocks, 0, 1) for index in range(batch)]
    runner.run(prompt, None, draft_passes=1)
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in SHAPES}
    for _ in range(repeats):
        for shape, plans in steps.items():
            for number in range(3):
                started = time.perf_counter()
                runner.run(plans, None, draft_passes=shape[1])
                if number:  # the first one finds the weights of another shape in the processor
                    seconds[shape].append(time.perf_counter() - started)
    ms = {shape: 1e3 * statistics.median(values) for shape, values in seconds.items()}
    return {
        "part": "speculation costs",
        "threads": threads,
        "batch": batch,
        "context": context,
        "one_row_ms": ms[1, 0],
        "two_rows_ms": ms[2, 0],
        "four_rows_ms": ms[4, 0],
        "one_draft_ms": ms[2, 1] - ms[2, 0],
        "three_drafts_ms": ms[4, 3] - ms[4, 0],
        "two_rows_and_draft_ms": ms[2, 1],
        "repeats": repeats,
    }


def _plans(
    batch: int, ids: list[int], context: int, blocks: int, rows: int, drafts: int
) -> list[SequencePlan]:
    return [
        _plan(index, ids[context : context + rows], context, blocks, rows, drafts)
        for index in range(batch)
    ]


def _plan(
    index: int, ids: list[int], first: int, blocks: int, num_samples: int, drafts: int
) -> SequencePlan:
    stop = first + len(ids)
    return SequencePlan(
        request_id=str(index),
        ids=tuple(ids),
        first_position=first,
        block_table=tuple(range(index * blocks, (index + 1) * blocks)),
        samples=tuple(
            SampleSpec(
                position=stop - num_samples + 1 + place,
                seed=0,
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                logprobs=None,
            )
            for place in range(num_samples)
        ),
        drafting=Drafting(
            first_position=0,
            num_drafts=drafts if num_samples else 0,
            num_passes=drafts,
            next_ids=(0,),
        )
        if drafts
        else None,
    )
