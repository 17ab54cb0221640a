"""Architectures that cannot be: one sentence, before anything is built."""

from __future__ import annotations

import pytest
from support.models import tiny_config

from dualray.errors import ConfigError
from dualray.model.config import YarnConfig


@pytest.mark.parametrize("rank", [0, -3])
def test_a_query_compression_to_nothing_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(q_lora_rank=rank)
    assert str(caught.value) == (
        f"model.q_lora_rank is {rank} and must be at least 1; set model.q_lora_rank to 1 or more, "
        "or to null for uncompressed queries."
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", float("inf")),
        ("factor", 0.5),
        ("original_max_position_embeddings", 0),
        ("beta_fast", 0.0),
        ("beta_slow", float("nan")),
        ("mscale", float("nan")),
        ("mscale_all_dim", float("inf")),
    ],
)
def test_yarn_needs_numbers_whose_logarithms_exist(field: str, value: float) -> None:
    values = {"factor": 4.0, "original_max_position_embeddings": 16} | {field: value}
    with pytest.raises(ConfigError, match=rf"^rope_scaling\.{field} is {value} and must be"):
        YarnConfig(**values)


def test_yarn_needs_rotations_of_different_speed() -> None:
    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=16)
    assert tiny_config(rope_theta=1.0).rope_theta == 1.0
    with pytest.raises(ConfigError, match=r"^model\.rope_theta is 1\.0 and must be above 1 under"):
        tiny_config(rope_theta=1.0, rope_scaling=yarn)
