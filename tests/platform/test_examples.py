"""Every example is a valid run: its schedule verifies and its model can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualray.model.count import count_parameters
from dualray.model.stage import Stage
from dualray.parallel.held import split_layers
from dualray.parallel.slots import contiguous_placement
from dualray.platform.run_file import RunFile, load_run_file, parse_run_file, to_mapping
from dualray.schedule.make import make_schedule
from dualray.schedule.verify import verify

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def example(name: str) -> RunFile:
    return load_run_file(FOLDER / name)


def test_the_examples_that_the_readme_names_are_there() -> None:
    assert {"laptop.yaml", "one-gpu.yaml", "cluster.yaml"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_loads_and_is_named_after_its_file(name: str) -> None:
    run = example(name)
    assert run.name == name.removesuffix(".yaml")
    assert parse_run_file(to_mapping(run)) == run
    run.serve.limits(run.model.max_position_embeddings)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_schedule_verifies(name: str) -> None:
    run = example(name)
    verify(make_schedule(run.layout.schedule, run.layout.pipeline, run.train.micro_batches))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_workers_stages_can_be_built(name: str) -> None:
    """On the meta device, as the first expert rank holds them; with all experts they add up."""
    run = example(name)
    model = run.model
    schedule = make_schedule(run.layout.schedule, run.layout.pipeline, run.train.micro_batches)
    ranges = split_layers(model.num_hidden_layers, schedule.num_stages)
    held = contiguous_placement(model, run.layout.experts).held[model.moe_layers[0]][0]
    with torch.device("meta"):
        shares = [Stage(model, layers, expert_ids=lambda _: held) for layers in ranges]
        whole = Stage(model, range(model.num_hidden_layers))
    counted = count_parameters(model)
    assert sum(p.numel() for p in whole.parameters()) == counted.total + counted.mtp
    moe_layers = sum(map(model.is_moe, range(model.num_hidden_layers)))
    one_expert = 3 * model.hidden_size * model.moe_intermediate_size
    missing = (model.n_routed_experts - len(held)) * one_expert
    assert sum(p.numel() for stage in shares for p in stage.parameters()) == (
        counted.total + counted.mtp - missing * (moe_layers + model.num_nextn_predict_layers)
    )


def test_the_laptop_needs_no_cluster() -> None:
    run = example("laptop.yaml")
    assert (run.layout.pipeline, run.layout.experts, run.layout.schedule) == (2, 2, "dualpipe")
    assert (run.cluster.address, run.cluster.gpus_per_worker) == (None, 0)


def test_one_gpu_is_one_worker() -> None:
    run = example("one-gpu.yaml")
    assert (run.layout.world_size, run.layout.schedule) == (1, "1f1b")
    assert (run.cluster.gpus_per_worker, run.train.dtype) == (1, "bfloat16")


def test_the_cluster_waits_for_an_autoscaler() -> None:
    run = example("cluster.yaml")
    assert (run.layout.pipeline, run.layout.experts, run.layout.schedule) == (8, 8, "dualpipe")
    assert run.train.dtype == "bfloat16"
    assert run.cluster.wait_for_resources_s > 600
    assert run.kubernetes.autoscale


def test_the_sizes_that_the_comments_state() -> None:
    assert round(count_parameters(example("one-gpu.yaml").model).total / 1e6) == 165
    cluster = count_parameters(example("cluster.yaml").model)
    assert (round(cluster.total / 1e9, 1), round(cluster.active / 1e9, 2)) == (1.8, 0.31)
