"""Rules for the settings of the `serve` section that say how a run begins and ends to serve."""

from __future__ import annotations

import math

from dualray.errors import ConfigError

OPTIMIZER_PLACES = ("keep", "park", "drop")


def check_modes(
    *,
    optimizer: str,
    drain_s: float,
    retry_after_s: float,
    port: int,
    metrics_port: int | None,
    admin_port: int | None,
) -> None:
    """Raises ConfigError for a setting that breaks a rule."""
    if optimizer not in OPTIMIZER_PLACES:
        raise ConfigError(
            f"serve.optimizer is {optimizer} and must be {', '.join(OPTIMIZER_PLACES[:-1])} or "
            f"{OPTIMIZER_PLACES[-1]}",
            hint="set it to park to use host memory, or leave it out to keep it",
        )
    if not 0 <= drain_s < math.inf:
        raise ConfigError(
            f"serve.drain_s is {drain_s} and must be at least 0",
            hint="set it to a number of seconds such as 30",
        )
    if not 0 < retry_after_s < 2**31 / 1000:
        raise ConfigError(
            f"serve.retry_after_s is {retry_after_s} and must be above 0 and fit into 31 bits of "
            "milliseconds",
            hint="set it to a number of seconds such as 30",
        )
    if admin_port is None:
        return
    if not 0 <= admin_port <= 65535:
        raise ConfigError(
            f"serve.admin_port is {admin_port} and must lie between 0 and 65535",
            hint="choose a port, 0 for a free one, or leave it out for no admin service",
        )
    for field, other in (("port", port), ("metrics_port", metrics_port)):
        if admin_port and admin_port == other:
            raise ConfigError(
                f"serve.admin_port and serve.{field} are both {admin_port} and must differ",
                hint="choose another serve.admin_port",
            )
