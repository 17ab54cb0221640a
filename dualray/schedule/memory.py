"""What a rank must remember while it walks its steps: the two counts that bound memory."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.schedule.actions import Kind, Step, flatten


@dataclass(frozen=True)
class Peaks:
    """Largest numbers of live micro-batches and of queued weight gradients, per rank.

    A micro-batch is live from its forward to the end of its B or I; an overlapped pair
    holds both of its micro-batches.
    """

    activations: tuple[int, ...]
    deferred: tuple[int, ...]


def peaks_of(steps: tuple[tuple[Step, ...], ...]) -> Peaks:
    """Peaks of every rank; they follow from each rank's own order alone."""
    per_rank = [_rank_peaks(rank_steps) for rank_steps in steps]
    return Peaks(tuple(live for live, _ in per_rank), tuple(queued for _, queued in per_rank))


def _rank_peaks(steps: tuple[Step, ...]) -> tuple[int, int]:
    live = queued = peak_live = peak_queued = 0
    for action in flatten(steps):
        match action.kind:
            case Kind.FORWARD:
                live += 1
            case Kind.BACKWARD:
                live -= 1
            case Kind.INPUT_GRAD:
                live -= 1
                queued += 1
            case Kind.WEIGHT_GRAD:
                queued -= 1
        peak_live, peak_queued = max(peak_live, live), max(peak_queued, queued)
    return peak_live, peak_queued
