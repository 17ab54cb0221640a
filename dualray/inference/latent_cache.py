"""The paged cache and attention over it (arXiv 2412.19437, section 2.1.1).

Of each token and layer one row is cached. With Multi-head Latent Attention that is the
compressed latent and the one rotary key, nothing per head, and attention never expands
them: the key half of the up-projection is folded into the query and the value half into
the output, so that all heads attend over the latent itself. That is the same sum as the
expanded attention of training, in another order. The other attentions cache their keys and
values; the query says which part of a row is which (`AttentionQuery`).

T tokens, H heads, G key/value heads, R = H / G, k key width, c value width, L row width,
N rows of the cache, n sequences, S cached positions of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dualray.inference.block_pool import blocks_for
from dualray.inference.bunched_rows import Bunch, attend, cut, make_bunch, rows_of
from dualray.inference.plan import SequencePlan
from dualray.model.context import AttentionQuery, ForwardContext


class LatentCache:
    """Blocks of one held stage copy: per layer a tensor (num_blocks, block_size, L)."""

    def __init__(
        self,
        layers: Iterable[int],
        *,
        num_blocks: int,
        block_size: int,
        row_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, row_dim)
        self.block_size = block_size
        self.layers = {i: torch.zeros(shape, dtype=dtype, device=device) for i in layers}

    @property
    def size_bytes(self) -> int:
        return sum(blocks.nbytes for blocks in self.layers.values())


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows [start, stop) are consecutive tokens of one sequence, from `first_position` on.

    `where` are the cached rows of its S positions: a slice where the blocks are neighbours,
    which is read in place, else their numbers.
    """

    start: int
    stop: int
    first_position: int
    where: slice | Tensor

    @property
    def length(self) -> int:
        """Positions S of the sequence, the new ones included."""
        return self.first_position + self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class SingleRows:
    """Sequences with one new token each, to be attended in one call, padded to the longest.

    `rows_n` is None if they are all rows of the step. `lengths_n` counts positions including the
    new one; `tables_nB` is padded with block 0.
    """

    rows_n: Tensor | None
    tables_nB: Tensor
    lengths_n: Tensor


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where each of a step's T rows reads and writes the cache."""

    positions_T: Tensor
    slots_T: Tensor
    seq_lens: tuple[int, ...]
    together: SingleRows | None
    parts: tuple[Part, ...]
    unsort_T: Tensor | None
    """Puts (single rows, bunches, parts) into the order of the rows; None if that it is."""
    bunches: tuple[tuple[Bunch, tuple[Part, ...]], ...] = ()
    """Single rows to be attended in a few calls, and the same one by one."""

    def in_row_order(self, outs: Sequence[Tensor]) -> Tensor:
        """The single rows' results, each bunch's, then each part's, as one tensor of T rows."""
        joined = outs[0] if len(outs) == 1 else torch.cat(list(outs))
        return joined if self.unsort_T is None else joined[self.unsort_T]

    @classmethod
    def build(
        cls,
        sequences: Sequence[SequencePlan],
        block_size: int,
        device: torch.device,
        *,
        together: bool | None = None,
    ) -> PagedBatch:
        """`together` attends single rows in one call, and false attends each by itself. By default
        all in one call where starting a kernel is dear, and in bunches on a CPU."""
        bunched = together is None and device.type == "cpu"
        if together is None:
            together = device.type != "cpu"
        positions: list[int] = []
        slots: list[int] = []
        single: list[Part] = []
        tables: list[tuple[int, ...]] = []
        parts: list[Part] = []
        for sequence in sequences:
            start = len(positions)
            first, last = sequence.first_position, sequence.first_position + len(sequence.ids)
            positions += range(first, last)
            slots += [
                sequence.block_table[at // block_size] * block_size + at % block_size
                for at in range(first, last)
            ]
            table = sequence.block_table[: blocks_for(last, block_size)]
            part = Part(
                start=start,
                stop=len(positions),
                first_position=first,
                where=_rows_of(table, last, block_size, device),
            )
            if (together or bunched) and part.stop == start + 1:
                single.append(part)
                tables.append(table)
            else:
                parts.append(part)
        bunches = []
        if bunched:
            chosen = cut([len(table) for table in tables], block_size)
            for members in chosen:
                group = tuple(single[i] for i in members)
                rows = None if len(members) == len(sequences) else [part.start for part in group]
                lengths = [part.length for part in group]
                bunch = make_bunch(rows, [tables[i] for i in members], lengths, block_size)
                bunches.append((bunch, group))
            single = [single[i] for members in chosen for i in members]
        order = [row for part in (*single, *parts) for row in range(part.start, part.stop)]
        unsort = None if order == sorted(order) else _integers(order, device).argsort()
        return cls(
            positions_T=_integers(positions, device),
            slots_T=_integers(slots, device),
            seq_lens=tuple(len(sequence.ids) for sequence in sequences),
            together=(
                _single_rows(single, tables, device, alone=not parts)
                if single and together
                else None
            ),
            parts=tuple(parts),
            unsort_T=unsort,
            bunches=tuple(bunches),
        )


def _integers(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _rows_of(
    table: tuple[int, ...], length: int, size: int, device: torch.device
) -> slice | Tensor:
    """Cached rows of a sequence's first `length` positions."""
    first, last = table[0], table[-1]
    if table == tuple(range(first, last + 1)):
        return slice(first * size, first * size + length)
    rows = _integers(list(table), device)[:, None] * size + torch.arange(size, device=device)
    return rows.flatten()[:length]


def _single_rows(
    single: Sequence[Part], tables: Sequence[tuple[int, ...]], device: torch.device, *, alone: bool
) -> SingleRows:
    width = max(map(len, tables))
    padded = [block for table in tables for block in (*table, *(0,) * (width - len(table)))]
    return SingleRows(
        rows_n=None if alone else _integers([part.start for part in single], device),
        tables_nB=_integers(padded, device).view(-1, width),
        lengths_n=_integers([part.length for part in single], device),
    )


class PagedAttention:
    """Attention backend of serving: writes this step's rows, attends over the cache.

    With `aligned` queries, and heads' keys and values, are copied to where a new tensor begins:
    products may round otherwise at another place in memory.
    """

    def __init__(self, cache: LatentCache, batch: PagedBatch, *, aligned: bool = False) -> None:
        self._cache = cache
        self._batch = batch
        self._aligned = aligned

    def attend(self, query: AttentionQuery, ctx: ForwardContext) -> Tensor:
        batch = self._batch
        blocks = self._cache.layers[query.layer]
        rows_NL = blocks.flatten(0, 1)
        # All rows before any is read: a sequence may share blocks that another one fills here.
        rows_NL.index_copy_(0, batch.slots_T, query.cache_rows())
        k_1GNk = query.cache_keys(rows_NL).transpose(0, 1)[None]
        v_1GNc = query.cache_values(rows_NL).transpose(0, 1)[None]
        # The H/G heads that share a key are further rows of one product.
        q_TGRk = query.cache_queries().unflatten(1, (k_1GNk.shape[1], -1))

        def alone(part: Part) -> Tensor:
            if isinstance(part.where, slice):
                keys, values = k_1GNk[:, :, part.where], v_1GNc[:, :, part.where]
            else:
                keys, values = (t.index_select(2, part.where) for t in (k_1GNk, v_1GNc))
            q_part = q_TGRk[part.start : part.stop]
            if self._aligned:
                q_part = q_part.clone()
                keys, values = keys.contiguous(), values.contiguous()
            return _attend_part(q_part, keys, values, part, query.softmax_scale)

        outs = []
        if batch.together is not None:
            outs.append(_attend_together(q_TGRk, blocks, batch.together, query))
        for bunch, parts in batch.bunches:
            out = _attend_bunch(q_TGRk, blocks, bunch, parts, query)
            outs += [alone(part) for part in parts] if out is None else [out]
        outs += [alone(part) for part in batch.parts]
        if not outs:
            outs.append(q_TGRk.new_empty(*q_TGRk.shape[:3], v_1GNc.shape[-1]))
        return query.cache_output(batch.in_row_order(outs).flatten(1, 2))


def _attend_together(
    q_TGRk: Tensor, blocks: Tensor, single: SingleRows, query: AttentionQuery
) -> Tensor:
    """One query row per sequence over its own cached positions: (n, G, R, c)."""
    rows_nSL = blocks[single.tables_nB].flatten(1, 2)
    outside_nS = torch.arange(rows_nSL.shape[1], device=blocks.device) >= single.lengths_n[:, None]
    # A weight of zero does not silence a NaN that an earlier request left in a reused block.
    rows_nSL.masked_fill_(outside_nS[..., None], 0.0)
    return F.scaled_dot_product_attention(
        q_TGRk if single.rows_n is None else q_TGRk[single.rows_n],
        query.cache_keys(rows_nSL).transpose(1, 2),
        query.cache_values(rows_nSL).transpose(1, 2),
        attn_mask=~outside_nS[:, None, None],
        scale=query.softmax_scale,
    )


def _attend_bunch(
    q_TGRk: Tensor, blocks: Tensor, bunch: Bunch, parts: Sequence[Part], query: AttentionQuery
) -> Tensor | None:
    """(n, G, R, c), or None where it does not pay or gives no numbers.

    Keys of several groups would have to be copied again, and products in 16 bits round scores.
    """
    if q_TGRk.shape[1] > 1 or q_TGRk.dtype not in (torch.float32, torch.float64):
        return None
    if len(parts) == 1 and isinstance(parts[0].where, slice):
        rows_nSL, outside_nS = blocks.flatten(0, 1)[parts[0].where][None], None
    else:
        rows_nSL, outside_nS = rows_of(bunch, blocks), bunch.outside_nS
    q_nGRk = q_TGRk if bunch.rows_n is None else q_TGRk.index_select(0, bunch.rows_n)
    out_nRc = attend(
        q_nGRk.squeeze(1),
        query.cache_keys(rows_nSL).squeeze(2),
        query.cache_values(rows_nSL).squeeze(2),
        outside_nS,
        query.softmax_scale,
    )
    return out_nRc[:, None] if bool(out_nRc.isfinite().all()) else None


def _attend_part(
    q_TGRk: Tensor, k_1GSk: Tensor, v_1GSc: Tensor, part: Part, scale: float
) -> Tensor:
    """Consecutive rows of one sequence, each over what precedes it: (T, G, R, c)."""
    if part.stop == part.start + 1:
        return F.scaled_dot_product_attention(q_TGRk, k_1GSk, v_1GSc, scale=scale)
    T, R = len(q_TGRk), q_TGRk.shape[2]
    position_T = torch.arange(part.first_position, part.length, device=q_TGRk.device)
    allowed_TS = torch.arange(part.length, device=q_TGRk.device) <= position_T[:, None]
    q_1GXk = q_TGRk.permute(1, 2, 0, 3).flatten(1, 2)[None]
    out_1GXc = F.scaled_dot_product_attention(
        q_1GXk, k_1GSk, v_1GSc, attn_mask=allowed_TS.repeat(R, 1), scale=scale
    )
    return out_1GXc[0].unflatten(1, (R, T)).permute(2, 0, 1, 3)
