"""Settings that say how a run begins and ends to serve."""

from __future__ import annotations

import pytest

from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"optimizer": "parked"},
            "serve.optimizer is parked and must be keep, park or drop; set it to park to use host "
            "memory, or leave it out to keep it.",
        ),
        (
            {"drain_s": -1.0},
            "serve.drain_s is -1.0 and must be at least 0; set it to a number of seconds such as "
            "30.",
        ),
        (
            {"drain_s": float("inf")},
            "serve.drain_s is inf and must be at least 0; set it to a number of seconds such as "
            "30.",
        ),
        (
            {"retry_after_s": 0.0},
            "serve.retry_after_s is 0.0 and must be above 0 and fit into 31 bits of milliseconds; "
            "set it to a number of seconds such as 30.",
        ),
        (
            {"admin_port": 70000},
            "serve.admin_port is 70000 and must lie between 0 and 65535; choose a port, 0 for a "
            "free one, or leave it out for no admin service.",
        ),
        (
            {"admin_port": 50051},
            "serve.admin_port and serve.port are both 50051 and must differ; choose another "
            "serve.admin_port.",
        ),
        (
            {"admin_port": 9400, "metrics_port": 9400},
            "serve.admin_port and serve.metrics_port are both 9400 and must differ; choose another "
            "serve.admin_port.",
        ),
    ],
)
def test_a_wrong_setting_is_a_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ServeConfig(**values)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    "values",
    [
        {"port": 0, "admin_port": 0, "metrics_port": 0},
        {"drain_s": 0.0, "retry_after_s": 0.5, "optimizer": "drop"},
    ],
)
def test_right_settings(values: dict) -> None:
    ServeConfig(**values)
