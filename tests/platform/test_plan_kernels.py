"""The planner's constants: they reproduce the published speeds that they are taken from."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from support.models import tiny_config

from dualray.platform.planning.exchange import exchange_seconds, reach
from dualray.platform.planning.hardware import hardware_names, load_hardware
from dualray.platform.planning.kernels import Attention, Product, Traffic, product_seconds, seconds
from dualray.platform.planning.precision import BFLOAT16, FLOAT32, FP8
from dualray.platform.preset import load_model

# (groups, rows, columns, depth): TFLOP/s on an H800. DeepGEMM, README of February 2025.
FORWARD = {
    (1, 4096, 2112, 7168): 1058,
    (1, 4096, 24576, 1536): 990,
    (1, 4096, 32768, 512): 590,
    (1, 4096, 7168, 16384): 1358,
    (1, 4096, 4096, 7168): 1304,
    (1, 4096, 7168, 2048): 1025,
    (4, 8192, 4096, 7168): 1297,
    (4, 8192, 7168, 2048): 1099,
    (8, 4096, 4096, 7168): 1288,
    (8, 4096, 7168, 2048): 1093,
}
# DeepGEMM, pull request 95.
WEIGHT_GRAD = {
    (1, 7168, 2112, 4096): 920,
    (1, 1536, 24576, 4096): 986,
    (1, 512, 32768, 4096): 878,
    (1, 16384, 7168, 4096): 994,
    (1, 7168, 4096, 4096): 942,
    (1, 2048, 7168, 4096): 920,
    (1, 7168, 2112, 8192): 1052,
    (1, 1536, 24576, 8192): 1092,
    (1, 512, 32768, 8192): 1014,
    (4, 7168, 4096, 4096): 939,
    (4, 2048, 7168, 4096): 900,
    (4, 7168, 4096, 8192): 1044,
    (4, 2048, 7168, 8192): 1033,
}
H800 = load_hardware("h800")


@pytest.mark.parametrize(("is_weight_grad", "table"), [(False, FORWARD), (True, WEIGHT_GRAD)])
def test_published_products(is_weight_grad: bool, table: dict) -> None:
    """Two constants for all shapes, whose speeds differ by a factor of 2.3: 7 % are left."""
    for (groups, rows, columns, depth), published in table.items():
        product = Product(
            groups=groups,
            rows=rows,
            columns=columns,
            depth=depth,
            is_weight_grad=is_weight_grad,
        )
        ours = product.flops / product_seconds(product, H800, FP8, H800.num_sms) / 1e12
        assert ours == pytest.approx(published, rel=0.07), product


@pytest.mark.parametrize(
    ("num_ranks", "gigabytes_per_s", "rel"), [(8, 153, 0.01), (16, 43, 0.25), (64, 46, 0.10)]
)
def test_published_dispatch(num_ranks: int, gigabytes_per_s: float, rel: float) -> None:
    """DeepEP, README of February 2025; its bandwidth counts a token once for each node that it
    visits, its own included, and inside one node for each other GPU. On two nodes NVLink is what
    is slow, and handing tokens on reaches less of it than a dispatch inside one node does."""
    model, num_tokens, width = load_model("deepseek-v3"), 4096, 1 + 4 / 128
    nodes = num_ranks // 8
    # It chooses among as many groups as there are nodes, at most four of them.
    model = replace(model, n_group=nodes, topk_group=min(nodes, 4))
    visits = reach(model, num_ranks, nodes) if nodes > 1 else reach(model, 8, 8) * 7 / 8
    duration = exchange_seconds(model, H800, num_ranks, num_tokens, width)
    logical = num_tokens * model.hidden_size * width * visits / duration / 1e9
    assert logical == pytest.approx(gigabytes_per_s, rel=rel)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("bins", [1, 2, 4, 8])
def test_reach_is_the_mean_over_all_choices(groups: tuple[int, int], bins: int) -> None:
    model = tiny_config(
        n_routed_experts=8, n_group=groups[0], topk_group=groups[1], num_experts_per_tok=2
    )
    size = 8 // model.n_group
    visited = [
        len({expert * bins // 8 for expert in experts})
        for chosen in combinations(range(model.n_group), model.topk_group)
        for experts in combinations([g * size + i for g in chosen for i in range(size)], 2)
    ]
    assert reach(model, 8, bins) == pytest.approx(sum(visited) / len(visited))


def test_reach_without_regard_to_groups_that_bins_cut() -> None:
    model = tiny_config(n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=1)
    assert reach(model, 6, 6) == pytest.approx(1.0)


def test_fewer_multiprocessors_are_never_faster() -> None:
    product = Product(rows=4096, columns=4096, depth=7168)
    durations = [seconds(product, H800, FP8, sms) for sms in range(132, 60, -1)]
    assert durations == sorted(durations)
    attention = Attention(flops=1e12)
    assert seconds(attention, H800, FP8, 112) > seconds(attention, H800, FP8, 132)
    traffic = Traffic(num_bytes=1e9)
    assert seconds(traffic, H800, FP8, 112) == seconds(traffic, H800, FP8, 132)


def test_wider_numbers_are_slower() -> None:
    for operation in (Product(rows=4096, columns=4096, depth=7168), Attention(flops=1e12)):
        fp8, bf16, fp32 = (seconds(operation, H800, p, 132) for p in (FP8, BFLOAT16, FLOAT32))
        assert fp8 <= bf16 < fp32


@pytest.mark.parametrize("name", hardware_names())
def test_every_figure_of_a_profile_has_a_source(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    unsourced = {"name", "title", "num_sms", "gpus_per_node", "sources"}
    assert set(hardware.sources) == set(vars(hardware)) - unsourced
