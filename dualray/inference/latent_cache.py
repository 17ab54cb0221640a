"""The paged cache and attention over it (arXiv 2412.19437, section 2.1.1).

Of each token and layer one row is cached. With Multi-head Latent Attention that is the
compressed latent and the one rotary key, nothing per head, and attention never expands
them: the key half of the up-projection is folded into the query and the value half into
the output, so that all heads attend over the latent itself. That is the same sum as the
expanded attention of training, in another order. The other attentions cache their keys and
values; the query says which part of a row is which (`AttentionQuery`).

T tokens, H heads, G key/value heads, R rows of queries per key/value head (H/G heads times
T), k key width, c value width, L row width, n sequences, S cached positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualray.inference.block_pool import blocks_for
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
class PromptPart:
    """Rows [start, stop) are consecutive tokens of one sequence, its cache included up to them."""

    start: int
    stop: int
    first_position: int
    blocks_B: Tensor


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where each of a step's T rows reads and writes the cache.

    Sequences with a single row are attended together, padded to the longest; `lengths_n`
    counts their positions including the new one, `tables_nB` is padded with block 0.
    """

    positions_T: Tensor
    slots_T: Tensor
    seq_lens: tuple[int, ...]
    single_rows_n: Tensor
    tables_nB: Tensor
    lengths_n: Tensor
    prompt_parts: tuple[PromptPart, ...]
    unsort_T: Tensor | None
    """Puts (single rows, prompt parts) into the order of the rows; None if that it is."""

    def in_row_order(self, outs: Sequence[Tensor]) -> Tensor:
        """The single rows' results, then each prompt part's, as one tensor of T rows."""
        joined = outs[0] if len(outs) == 1 else torch.cat(list(outs))
        return joined if self.unsort_T is None else joined[self.unsort_T]

    @classmethod
    def build(
        cls, sequences: Sequence[SequencePlan], block_size: int, device: torch.device
    ) -> PagedBatch:
        positions: list[int] = []
        slots: list[int] = []
        single: list[tuple[int, SequencePlan]] = []
        parts: list[PromptPart] = []
        for sequence in sequences:
            start = len(positions)
            first, last = sequence.first_position, sequence.first_position + len(sequence.ids)
            positions += range(first, last)
            slots += [
                sequence.block_table[at // block_size] * block_size + at % block_size
                for at in range(first, last)
            ]
            if len(sequence.ids) == 1:
                single.append((start, sequence))
                continue
            used = sequence.block_table[: blocks_for(last, block_size)]
            parts.append(
                PromptPart(
                    start=start,
                    stop=len(positions),
                    first_position=first,
                    blocks_B=torch.tensor(used, device=device),
                )
            )
        lengths = [sequence.first_position + 1 for _, sequence in single]
        width = blocks_for(max(lengths, default=0), block_size)
        tables = [
            (*sequence.block_table[:width], *(0,) * (width - len(sequence.block_table)))
            for _, sequence in single
        ]

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        rows = [row for row, _ in single]
        for part in parts:
            rows += range(part.start, part.stop)
        in_order = rows == sorted(rows)
        return cls(
            positions_T=integers(positions),
            slots_T=integers(slots),
            seq_lens=tuple(len(sequence.ids) for sequence in sequences),
            single_rows_n=integers([row for row, _ in single]),
            unsort_T=None if in_order else integers(rows).argsort(),
            tables_nB=integers([block for table in tables for block in table]).view(
                len(single), width
            ),
            lengths_n=integers(lengths),
            prompt_parts=tuple(parts),
        )


class PagedAttention:
    """Attention backend of serving: writes this step's rows, attends over the cache."""

    def __init__(self, cache: LatentCache, batch: PagedBatch) -> None:
        self._cache = cache
        self._batch = batch

    def attend(self, query: AttentionQuery, ctx: ForwardContext) -> Tensor:
        batch = self._batch
        blocks = self._cache.layers[query.layer]
        blocks.view(-1, blocks.shape[-1]).index_copy_(0, batch.slots_T, query.cache_rows())
        q_THk = _precise(query.cache_queries()) * query.softmax_scale
        outs = [
            _attend_part(q_THk[part.start : part.stop], blocks, part, query)
            for part in batch.prompt_parts
        ]
        if batch.single_rows_n.numel():
            outs.insert(0, _attend_single(q_THk[batch.single_rows_n], blocks, batch, query))
        if not outs:
            width = query.cache_values(blocks[0, :1]).shape[-1]
            outs.append(blocks.new_empty(0, q_THk.shape[1], width))
        return query.cache_output(batch.in_row_order(outs))


def _attend_single(
    q_nHk: Tensor, blocks: Tensor, batch: PagedBatch, query: AttentionQuery
) -> Tensor:
    """One query row per sequence over its own cached positions: (n, H, c)."""
    rows_nSL = blocks[batch.tables_nB].flatten(1, 2)
    outside_nS = torch.arange(rows_nSL.shape[1], device=q_nHk.device) >= batch.lengths_n[:, None]
    # A weight of zero does not silence a NaN that an earlier request left in a reused block.
    rows_nSL.masked_fill_(outside_nS[..., None], 0.0)
    return _attend(q_nHk[:, None], rows_nSL, outside_nS[:, None], query).squeeze(1)


def _attend_part(q_THk: Tensor, blocks: Tensor, part: PromptPart, query: AttentionQuery) -> Tensor:
    """Consecutive rows of one sequence, each over what precedes it: (T, H, c)."""
    S = part.first_position + q_THk.shape[0]
    rows_SL = blocks[part.blocks_B].flatten(0, 1)[:S]
    position_T = torch.arange(part.first_position, S, device=q_THk.device)
    later_TS = torch.arange(S, device=q_THk.device) > position_T[:, None]
    return _attend(q_THk[None], rows_SL[None], later_TS[None], query).squeeze(0)


def _attend(q_nTHk: Tensor, rows_nSL: Tensor, outside_nTS: Tensor, query: AttentionQuery) -> Tensor:
    """Softmax attention of T rows of each of n sequences over its S cached rows: (n, T, H, c)."""
    keys_nGkS = _precise(query.cache_keys(rows_nSL)).permute(0, 2, 3, 1)
    values_nGSc = query.cache_values(rows_nSL).transpose(1, 2)
    G, T = keys_nGkS.shape[1], q_nTHk.shape[1]
    # The H/G heads that share a key are further rows of one product.
    q_nGRk = q_nTHk.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_nGRS = q_nGRk @ keys_nGkS
    scores_nGRS.unflatten(2, (-1, T)).masked_fill_(outside_nTS[:, None, None], float("-inf"))
    out_nGRc = scores_nGRS.softmax(-1).to(values_nGSc.dtype) @ values_nGSc
    return out_nGRc.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _precise(x: Tensor) -> Tensor:
    """fp32 at least: scores rounded to bf16 before the softmax drift from the training path."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
