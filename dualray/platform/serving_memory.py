"""Whether a worker has room for what serving takes: weights and latent cache, known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualray.actors.stage_worker import WorkerInfo
from dualray.errors import ConfigError
from dualray.inference.limits import Limits
from dualray.model.config import ModelConfig
from dualray.parallel.layout import Layout
from dualray.parallel.slots import ExpertPlacement
from dualray.platform.expert_moves import memory_bytes
from dualray.platform.mode_words import size
from dualray.platform.planning.holding import Held, held_by_stage
from dualray.platform.planning.setting import Candidate
from dualray.platform.scheduling.choice import Choice
from dualray.schedule.make import make_schedule


def refuse_to_serve_beyond_memory(
    model: ModelConfig,
    dtype: str,
    layout: Layout,
    choice: Choice,
    placement: ExpertPlacement,
    limits: Limits,
    infos: Sequence[WorkerInfo],
) -> None:
    """Raises ConfigError if weights, redundant experts and latent cache of a worker exceed its
    memory. What a step takes besides is not counted, so that what passes may still be tight."""
    weights, cache = serving_bytes(model, dtype, layout, choice, placement, limits)
    memory = memory_bytes(infos)
    if weights + cache > memory:
        raise ConfigError(
            f"serving takes {size(weights)} of a worker for weights and {size(cache)} for its "
            f"latent cache (serve.max_batch, serve.max_context), and it has {size(memory)}",
            hint="lower serve.max_batch or serve.max_context, or have more workers",
        )


def serving_bytes(
    model: ModelConfig,
    dtype: str,
    layout: Layout,
    choice: Choice,
    placement: ExpertPlacement,
    limits: Limits,
) -> tuple[int, int]:
    """(weights, latent cache) in bytes of the worker that holds most of both."""
    schedule = make_schedule(choice.schedule, layout.pipeline, choice.micro_batches)
    candidate = Candidate(
        pipeline=layout.pipeline,
        experts=layout.experts,
        replicas=layout.replicas,
        schedule=choice.schedule,
        micro_batch_size=choice.micro_batch_size,
        micro_batches=choice.micro_batches,
        layers_per_stage=choice.layers,
    )
    itemsize = getattr(torch, dtype).itemsize
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    held = held_by_stage(model, candidate, schedule)
    firsts = [sum(choice.layers[:stage]) for stage in range(len(choice.layers))]
    found, depths = [], model.num_nextn_predict_layers
    for stages in schedule.stage_of:
        own = sum((held[stage] for stage in stages), start=Held()).total
        layers = [
            layer
            for stage in stages
            for layer in range(firsts[stage], firsts[stage] + choice.layers[stage])
        ]
        ends = schedule.num_stages - 1 in stages
        modules = range(model.num_hidden_layers, model.num_hidden_layers + ends * depths)
        copied = max(
            sum(
                len(placement.copies(layer, rank))
                for layer in (*layers, *modules)
                if layer in placement.held
            )
            for rank in range(layout.experts)
        )
        drafting = limits.draft_modules * ends
        rows = (len(layers) + drafting) * limits.num_blocks * limits.block_size
        found.append(
            ((own + copied * expert) * itemsize, rows * model.cache_dim * itemsize),
        )
    return max(found, key=sum)
