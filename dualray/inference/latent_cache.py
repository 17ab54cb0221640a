"""The paged latent cache and absorbed attention over it (arXiv 2412.19437, section 2.1.1).

Cached per token and layer are the compressed latent and the one rotary key, nothing per
head. Attention never expands them: the key half of the up-projection is folded into the
query and the value half into the output, so that all heads attend over the latent itself
(C + R wide keys, C wide values). That is the same sum as the expanded attention of
training, in another order.

T tokens, H heads, N nope width, R rotary width, V value width, C latent, L = C + R,
n sequences, S cached positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualray.inference.block_pool import blocks_for
from dualray.inference.plan import SequencePlan
from dualray.model.context import ForwardContext, LatentQuery


class LatentCache:
    """Blocks of one held stage copy: per layer a tensor (num_blocks, block_size, L)."""

    def __init__(
        self,
        layers: Iterable[int],
        *,
        num_blocks: int,
        block_size: int,
        latent_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, latent_dim)
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

        return cls(
            positions_T=integers(positions),
            slots_T=integers(slots),
            seq_lens=tuple(len(sequence.ids) for sequence in sequences),
            single_rows_n=integers([row for row, _ in single]),
            tables_nB=integers([block for table in tables for block in table]).view(
                len(single), width
            ),
            lengths_n=integers(lengths),
            prompt_parts=tuple(parts),
        )


class PagedAttention:
    """Attention backend of serving: writes this step's latents, attends over the cache."""

    def __init__(self, cache: LatentCache, batch: PagedBatch) -> None:
        self._cache = cache
        self._batch = batch

    def attend(self, query: LatentQuery, ctx: ForwardContext) -> Tensor:
        batch = self._batch
        T, H, nope = query.q_nope_THN.shape
        blocks = self._cache.layers[query.layer]
        rows_TL = torch.cat((query.latent_TC, query.k_rope_TR), dim=-1)
        blocks.view(-1, blocks.shape[-1]).index_copy_(0, batch.slots_T, rows_TL)

        C = query.latent_TC.shape[1]
        up_HWC = query.kv_b.weight.view(H, -1, C)
        folded_THC = torch.einsum("thn,hnc->thc", query.q_nope_THN, up_HWC[:, :nope])
        q_THL = _precise(torch.cat((folded_THC, query.q_rope_THR), dim=-1)) * query.softmax_scale

        out_THC = folded_THC.new_empty(T, H, C)
        if batch.single_rows_n.numel():
            out_nHC = _attend_single(q_THL[batch.single_rows_n], blocks, batch, C)
            out_THC[batch.single_rows_n] = out_nHC
        for part in batch.prompt_parts:
            out_THC[part.start : part.stop] = _attend_part(
                q_THL[part.start : part.stop], blocks, part, C
            )
        return torch.einsum("thc,hvc->thv", out_THC, up_HWC[:, nope:])


def _attend_single(q_nHL: Tensor, blocks: Tensor, batch: PagedBatch, C: int) -> Tensor:
    """One query row per sequence over its own cached positions: (n, H, C)."""
    keys_nSL = blocks[batch.tables_nB].flatten(1, 2)
    S = keys_nSL.shape[1]
    outside_nS = torch.arange(S, device=q_nHL.device) >= batch.lengths_n[:, None]
    # A weight of zero does not silence a NaN that an earlier request left in a reused block.
    keys_nSL.masked_fill_(outside_nS[..., None], 0.0)
    scores_nHS = torch.bmm(_precise(q_nHL), _precise(keys_nSL).transpose(1, 2))
    scores_nHS.masked_fill_(outside_nS[:, None], float("-inf"))
    return torch.bmm(scores_nHS.softmax(-1).to(keys_nSL.dtype), keys_nSL[..., :C])


def _attend_part(q_THL: Tensor, blocks: Tensor, part: PromptPart, C: int) -> Tensor:
    """Consecutive rows of one sequence, each over what precedes it: (T, H, C)."""
    T = q_THL.shape[0]
    S = part.first_position + T
    keys_SL = blocks[part.blocks_B].flatten(0, 1)[:S]
    scores_HTS = _precise(q_THL).transpose(0, 1) @ _precise(keys_SL).t()
    position_T = torch.arange(part.first_position, S, device=q_THL.device)
    later_TS = torch.arange(S, device=q_THL.device) > position_T[:, None]
    scores_HTS.masked_fill_(later_TS, float("-inf"))
    return (scores_HTS.softmax(-1).to(keys_SL.dtype) @ keys_SL[:, :C]).transpose(0, 1)


def _precise(x: Tensor) -> Tensor:
    """fp32 at least: scores rounded to bf16 before the softmax drift from the training path."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
