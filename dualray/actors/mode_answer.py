"""What a run answers to who wants it in another mode: plain values, for any process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModeAnswer:
    """What became of a request for a mode."""

    mode: str
    """The one that the run is in now: train, serve or pause."""
    switched: bool
    """False if it was in that mode already."""
    step: int
    """Optimizer steps done."""
    sentences: tuple[str, ...]
    """What happened, for a person."""
    came_from: str | None = None
    """The mode before the switch."""
    target: str | None = None
    """HOST:PORT at which the run serves now."""
    first_token_s: float | None = None
    """Seconds from the last optimizer step, or from the end of a pause, to the first token."""
    first_step_s: float | None = None
    """Seconds from when the workers were free to the end of the first optimizer step."""
    drain_s: float | None = None
    """Seconds in which accepted requests ended."""
    num_cut: int = 0
    """Accepted requests that did not end in time."""
    optimizer: str | None = None
    """Where optimizer state is, or came from: keep, park or drop."""
    kept_bytes: tuple[int, ...] = ()
    """Optimizer state that stays where training uses it, by worker."""
    parked_bytes: tuple[int, ...] = ()
    dropped_bytes: tuple[int, ...] = ()
    gradient_bytes: tuple[int, ...] = ()
    """Gradient buffers that were given back, by worker."""
    cache_bytes: tuple[int, ...] = ()
    """Latent cache, by worker."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a run does not switch."""

    sentence: str
    hint: str
