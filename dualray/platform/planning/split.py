"""Where to cut the layers into stages so that no pipeline rank holds up the others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate

# How many layers a stage may have more or fewer than the mean of those still to be cut.
_SLACK = 1


@cache
def balanced_split(
    layers: tuple[int, ...], last: int, num_stages: int, *, paired: bool
) -> tuple[int, ...]:
    """Layers of each stage, in order; each stage has at least one.

    `layers` are their durations and `last` what the last stage takes besides, in any unit: whole
    numbers, so that equally long cuts compare as equal. What is made short is the longest rank:
    `paired` ranks hold the stages s and num_stages-1-s (DualPipe, DualPipeV), others one. Of
    equally good cuts the one with the most even stages is taken, and of those the one with the
    fewest layers in front, where most micro-batches are kept. DeepSeek-V3 in 16 paired stages is
    cut into 15 of four layers and one of one layer with head and MTP module, which may be why it
    has 61 layers.
    """
    num_layers = len(layers)
    assert 1 <= num_stages <= num_layers, (num_stages, num_layers)
    before = [0, *accumulate(layers)]

    def stage(start: int, stop: int) -> int:
        return before[stop] - before[start] + (last if start < stop == num_layers else 0)

    # (longest rank, sum of squared stages, layers of the stages) of the best cut into `ranks`
    # ranks of the layers from `start` to `stop`; the stages of a rank are the outermost.
    @cache
    def best(start: int, stop: int, ranks: int) -> tuple[float, int, tuple[int, ...]]:
        if not ranks:
            return 0, 0, ()
        found = []
        for front, back in _choices(stop - start, ranks, paired, ends=stop == num_layers):
            inner = best(start + front, stop - back, ranks - 1)
            outer = stage(start, start + front), stage(stop - back, stop)
            found.append(
                (
                    max(sum(outer), inner[0]),
                    outer[0] ** 2 + outer[1] ** 2 + inner[1],
                    (front, *inner[2], *((back,) if back else ())),
                )
            )
        return min(found, default=(float("inf"), 0, ()))

    return best(0, num_layers, num_stages // 2 if paired else num_stages)[2]


def _choices(layers: int, ranks: int, paired: bool, ends: bool) -> Iterator[tuple[int, int]]:
    """Layers of the outermost rank's stages: at the front, and at the back if paired."""
    if not paired:
        mean = layers // ranks
        fewest = max(1, mean - _SLACK)
        most = min(mean + 1 + _SLACK, layers - ranks + 1)
        yield from ((front, 0) for front in range(fewest if ranks > 1 else layers, most + 1))
        return
    if ranks == 1:
        yield from ((front, layers - front) for front in range(1, layers))
        return
    mean = layers // (2 * ranks)
    most = min(mean + 1 + _SLACK, layers - 2 * ranks + 1)
    fewest = max(1, mean - _SLACK)
    for front in range(fewest, most + 1):
        # The last stage has more than layers and may be short of them.
        for back in range(1 if ends else fewest, most + 1):
            if layers - front - back >= 2 * (ranks - 1):
                yield front, back
