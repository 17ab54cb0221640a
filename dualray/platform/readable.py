"""Numbers as people read them, in few characters and always the same way."""

import math


def number(value: float, digits: int) -> str:
    """A number with so many decimals; large ones keep their width by an exponent."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 10_000 else f"{value:.2e}"


def count(value: float) -> str:
    """A count in a few characters: 873, 12.3k, 4.56M, 671B."""
    if not math.isfinite(value):
        return str(value)
    if value < 999.5:
        return f"{value:.0f}"
    power = 0
    while value >= 999.5 and power < len("kMBT"):
        value /= 1e3
        power += 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{'kMBT'[power - 1]}"


def duration(seconds: float) -> str:
    """A duration in at most six characters: 42s, 3m07s, 2h14m, 3d04h."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    if minutes:
        return f"{minutes}m{second:02}s"
    return f"{whole}s"
