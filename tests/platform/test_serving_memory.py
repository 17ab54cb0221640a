"""What serving takes of a worker, foreseen and real."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import tiny_config

from dualray.actors.stage_worker import WorkerInfo
from dualray.errors import ConfigError
from dualray.inference.latent_cache import LatentCache
from dualray.inference.serve_config import ServeConfig
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.held import HeldStages
from dualray.parallel.layout import Layout
from dualray.platform.scheduling.choice import Choice
from dualray.platform.serving_memory import refuse_to_serve_beyond_memory, serving_bytes
from dualray.schedule.make import make_schedule

MODEL = tiny_config(n_routed_experts=8)
LAYOUTS = [
    Layout(pipeline=1, experts=1, schedule="1f1b"),
    Layout(pipeline=2, experts=2, schedule="1f1b"),
    Layout(pipeline=2, experts=2, schedule="dualpipe"),
]
SERVE = ServeConfig(max_batch=2, max_context=24, block_size=4)


def choice_of(layout: Layout) -> Choice:
    stages = make_schedule(layout.schedule, layout.pipeline, 4).num_stages
    share, extra = divmod(MODEL.num_hidden_layers, stages)
    layers = tuple(share + (stage < extra) for stage in range(stages))
    return Choice(schedule=layout.schedule, layers=layers, micro_batch_size=1, micro_batches=4)


def real_bytes(layout: Layout, experts: ExpertsConfig, limits, rank: int) -> tuple[int, int]:
    """Of the worker at `rank`: its parameters, and a cache for each layer that it holds."""
    schedule = make_schedule(layout.schedule, layout.pipeline, 4)
    held = HeldStages(
        MODEL,
        schedule,
        layout.coordinate(rank),
        experts.first_placement(MODEL, layout),
        seed=0,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        layers=choice_of(layout).layers,
    )
    tensors = [*held.dense_parameters().values(), *held.expert_parameters().values()]
    if held.embedding_copy is not None:
        tensors.append(held.embedding_copy.weight)
    layers = [layer for stage in held.stages.values() for layer in stage.layer_range]
    cache = LatentCache(
        range(len(layers)),
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        row_dim=MODEL.cache_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values()), cache.size_bytes


@pytest.mark.parametrize("redundant", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.schedule)
def test_it_is_foreseen_as_it_is(layout: Layout, redundant: int) -> None:
    experts = ExpertsConfig(redundant=redundant if layout.experts > 1 else 0)
    limits = SERVE.limits(MODEL.max_position_embeddings)
    foreseen = serving_bytes(
        MODEL, "bfloat16", layout, choice_of(layout), experts.first_placement(MODEL, layout), limits
    )
    real = [real_bytes(layout, experts, limits, rank) for rank in range(layout.world_size)]
    assert foreseen == max(real, key=sum)
    # What drafts is cached too.
    drafting = serving_bytes(
        MODEL, "bfloat16", layout, choice_of(layout), experts.first_placement(MODEL, layout),
        replace(limits, draft_tokens=1, draft_modules=1),
    )  # fmt: skip
    rows = limits.num_blocks * limits.block_size
    assert drafting[1] in (foreseen[1], foreseen[1] + rows * MODEL.cache_dim * 2)


def test_more_than_a_worker_has_is_refused() -> None:
    layout = LAYOUTS[0]
    placement = ExpertsConfig().first_placement(MODEL, layout)
    limits = replace(SERVE, max_batch=100_000, max_step_tokens=100_000).limits(
        MODEL.max_position_embeddings
    )
    what = (MODEL, "float32", layout, choice_of(layout), placement, limits)
    needs = sum(serving_bytes(*what))

    def infos(memory_bytes: float) -> list[WorkerInfo]:
        return [WorkerInfo(rank=0, pid=1, node="a", memory_bytes=memory_bytes, has_device=True)]

    refuse_to_serve_beyond_memory(*what, infos(needs))
    with pytest.raises(ConfigError) as raised:
        refuse_to_serve_beyond_memory(*what, infos(needs - 1))
    assert "for its latent cache (serve.max_batch, serve.max_context), and it has" in str(
        raised.value
    )
