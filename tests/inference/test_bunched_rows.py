"""Single rows attended in bunches, against each by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualray.inference import bunched_rows
from dualray.inference.bunched_rows import MAX_ROWS, cut
from dualray.inference.latent_cache import LatentCache, PagedAttention, PagedBatch
from dualray.inference.plan import SequencePlan
from dualray.model.attention import LatentQuery
from dualray.model.context import ForwardContext
from dualray.model.linear import Linear
from dualray.model.moe import LocalDispatch

BLOCK = 4
CPU = torch.device("cpu")


@given(
    num_blocks=st.lists(st.integers(1, 2 * MAX_ROWS // 16), max_size=40),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_every_sequence_is_in_one_bunch_and_bunches_are_small(num_blocks, block_size):
    bunches = cut(num_blocks, block_size)
    assert sorted(i for bunch in bunches for i in bunch) == list(range(len(num_blocks)))
    for bunch in bunches:
        rows = len(bunch) * max(num_blocks[i] for i in bunch) * block_size
        assert rows <= MAX_ROWS or len(bunch) == 1
    if len(bunches) == 1:
        assert bunches[0] == list(range(len(num_blocks)))


def test_like_lengths_go_together():
    assert cut([1, 500, 2, 500], 16) == [[1], [3], [2, 0]]
    assert cut([], 16) == []


def step(sequences: list[tuple[int, int, list[int]]]) -> list[SequencePlan]:
    return [
        SequencePlan(
            request_id=str(index),
            ids=(0,) * count,
            first_position=first,
            block_table=tuple(table),
            samples=(),
        )
        for index, (first, count, table) in enumerate(sequences)
    ]


def attend(sequences: list[SequencePlan], cache: LatentCache, together: bool | None):
    """What attention gives, and the rows that the step has written."""
    torch.manual_seed(1)
    T, H, nope, rope, v, C = sum(len(s.ids) for s in sequences), 3, 10, 6, 12, 8
    kv_b = Linear(C, H * (nope + v)).double()
    torch.nn.init.normal_(kv_b.weight)
    query = LatentQuery(
        layer=0,
        q_THd=torch.randn(T, H, nope + rope).double(),
        latent_TC=torch.randn(T, C).double(),
        k_rope_TR=torch.randn(T, rope).double(),
        kv_b=kv_b,
        softmax_scale=0.2,
    )
    batch = PagedBatch.build(sequences, BLOCK, CPU, together=together)
    backend = PagedAttention(cache, batch)
    ctx = ForwardContext(
        positions_T=batch.positions_T,
        seq_lens=batch.seq_lens,
        attention=backend,
        dispatch=LocalDispatch(1),
    )
    with torch.inference_mode():
        return backend.attend(query, ctx), batch


def new_cache() -> LatentCache:
    cache = LatentCache(
        [0], num_blocks=40, block_size=BLOCK, row_dim=14, dtype=torch.float64, device=CPU
    )
    torch.manual_seed(2)
    cache.layers[0].normal_()
    return cache


# A prompt part between single rows, tables in order and not, and one sequence that is long.
MIXED = [
    (5, 1, [3, 4]),
    (2, 6, [7, 2]),
    (0, 1, [9]),
    (10, 1, [30, 11, 20]),
    (31, 1, list(range(12, 20))),
]


@pytest.mark.parametrize("most", [8, 16, 64, MAX_ROWS])
@pytest.mark.parametrize("sequences", [MIXED, [MIXED[0]], [MIXED[3]], MIXED[2:], [MIXED[1]]])
def test_bunches_give_what_each_gives_by_itself(monkeypatch, most, sequences):
    monkeypatch.setattr(bunched_rows, "MAX_ROWS", most)
    plans = step(sequences)
    alone, _ = attend(plans, new_cache(), False)
    bunched, batch = attend(plans, new_cache(), None)
    assert sum(len(parts) for _, parts in batch.bunches) == sum(c == 1 for _, c, _ in sequences)
    if most == 8 and sequences is MIXED:
        assert len(batch.bunches) > 2
    # Another order of summing, in float64.
    torch.testing.assert_close(bunched, alone, atol=1e-12, rtol=1e-12)


def test_bunches_are_what_runs(monkeypatch):
    """The twin above would agree with itself if bunches were never attended."""
    monkeypatch.setattr("dualray.inference.latent_cache._attend_part", None)
    out, _ = attend(step(MIXED[2:]), new_cache(), None)
    assert out.isfinite().all()


def test_no_number_of_another_sequence_reaches_one():
    """Of its own it shows; behind the end of a sequence's rows a block may hold anything."""
    plans = step(MIXED)
    cache = new_cache()
    cache.layers[0][20, 3] = float("nan")  # behind position 10 of the fourth sequence
    expected, _ = attend(plans, new_cache(), False)
    torch.testing.assert_close(attend(plans, cache, None)[0], expected, atol=1e-12, rtol=1e-12)
    cache.layers[0][3, 1] = float("nan")  # position 1 of the first
    out, _ = attend(plans, cache, None)
    assert out[0].isnan().any()
    torch.testing.assert_close(out[1:], expected[1:], atol=1e-12, rtol=1e-12)
