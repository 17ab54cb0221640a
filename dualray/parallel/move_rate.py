"""What migrations took, apart into what every one takes and what a byte takes.

A migration builds optimizers and buffers anew however little moves. If all its seconds were put
down to its bytes, one small migration would make every larger one look too expensive to be tried.
"""

from __future__ import annotations

from collections import deque

import numpy as np

KEPT = 8
"""Migrations that are looked back upon."""
LEAST_VARIETY = 0.1
"""How much their bytes must differ, relative, to tell what a byte takes."""


class MoveRate:
    """Seconds foreseen as overhead + bytes / rate. Plain data."""

    def __init__(self, link_bytes_per_s: float) -> None:
        """`link_bytes_per_s` is taken to be true as far as nothing was measured."""
        self._link = link_bytes_per_s
        self._seen = deque[tuple[float, float]](maxlen=KEPT)

    def observe(self, num_bytes: float, seconds: float) -> None:
        """One migration: bytes that came to its busiest worker, and how long it took."""
        if seconds > 0:
            self._seen.append((num_bytes, seconds))

    def fit(self) -> tuple[float, float]:
        """(seconds of any migration, bytes a second): least squares, neither negative.

        Of migrations that were about equally large, bytes explain no more than the configured
        rate says they do.
        """
        if not self._seen:
            return 0.0, self._link
        size_M, seconds_M = np.array(self._seen, dtype=np.float64).T
        size, seconds = float(size_M.mean()), float(seconds_M.mean())
        if size_M.std() > LEAST_VARIETY * size:
            s_per_byte = float(np.mean((size_M - size) * (seconds_M - seconds)) / size_M.var())
            overhead_s = seconds - s_per_byte * size
            if overhead_s < 0:
                overhead_s = 0.0
                s_per_byte = float(np.mean(size_M * seconds_M) / np.mean(size_M**2))
            if s_per_byte > 0:
                return overhead_s, 1 / s_per_byte
        explained_s = size / self._link
        if explained_s > seconds:
            return 0.0, size / seconds
        return seconds - explained_s, self._link
