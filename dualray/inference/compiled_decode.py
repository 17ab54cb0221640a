"""Decode steps of a stage as one compiled function.

A step that runs one token of a few sequences is hundreds of small operations, each of which
costs more to start than to do. torch.compile makes one function of the whole stage, for
which shapes must not depend on values: the batch is padded to a power of two with sequences
that live in a block of their own, all rows attend together, and the width of the block
tables stays a variable of the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from dualray.inference.latent_cache import LatentCache, PagedAttention, PagedBatch, SingleRows
from dualray.inference.plan import SequencePlan
from dualray.model.context import ExpertDispatch, ForwardContext
from dualray.model.stage import Stage

_MIN_BLOCKS = 2
"""Widths of 0 and 1 are constants to torch.compile, which would compile again for the next."""


class CompiledDecode:
    """Decode steps of up to `max_batch` sequences; `padding_block` of the cache is nobody else's.

    The dispatch must not exchange with other workers, nor read sizes from values.
    """

    def __init__(
        self,
        stage: Stage,
        cache: LatentCache,
        dispatch: ExpertDispatch,
        *,
        max_batch: int,
        padding_block: int,
    ) -> None:
        self._stage, self._cache, self._dispatch = stage, cache, dispatch
        self._padding = SequencePlan(
            request_id="", ids=(0,), first_position=0, block_table=(padding_block,), samples=()
        )
        self._sizes = [2**i for i in range((max_batch - 1).bit_length() + 1)]
        self._steps = {
            size: torch.compile(_own_step(), fullgraph=True, dynamic=False) for size in self._sizes
        }

    def warm_up(self) -> None:
        """Compile every batch size, which takes up to a minute each on a CPU."""
        weight = next(self._stage.parameters())
        for size in self._sizes:
            hidden = weight.new_zeros(size, self._stage.config.hidden_size)
            self.run([self._padding] * size, None if self._stage.is_first else hidden)

    def takes(self, sequences: Sequence[SequencePlan]) -> bool:
        """Whether each of the sequences has one new token, and there are few enough."""
        return 0 < len(sequences) <= self._sizes[-1] and all(len(s.ids) == 1 for s in sequences)

    @torch.inference_mode()
    def run(self, sequences: Sequence[SequencePlan], hidden_TD: Tensor | None) -> Tensor:
        """Hidden states (T, D) of the stage, normalised for the head if it is the last one."""
        size = next(size for size in self._sizes if size >= len(sequences))
        missing = size - len(sequences)
        padded = [*sequences, *[self._padding] * missing]
        device = next(iter(self._cache.layers.values())).device
        batch = PagedBatch.build(padded, self._cache.block_size, device, together=True)
        assert batch.together is not None
        if hidden_TD is None:
            x = torch.tensor([s.ids[0] for s in padded], device=device)
        else:
            x = F.pad(hidden_TD, (0, 0, 0, missing))
        tables_nB = batch.together.tables_nB
        tables_nB = F.pad(tables_nB, (0, max(0, _MIN_BLOCKS - tables_nB.shape[1])))
        torch._dynamo.mark_dynamic(tables_nB, 1)
        out = self._steps[size](
            self._stage,
            self._cache,
            self._dispatch,
            x,
            batch.positions_T,
            batch.slots_T,
            tables_nB,
            batch.together.lengths_n,
        )
        return out[: len(sequences)]


def _own_step() -> Callable[..., Tensor]:
    """`_step` with a code object of its own, to which torch.compile ties what it has compiled: it
    refuses a ninth variant of one, and sizes times held stages are more."""
    return FunctionType(_step.__code__.replace(), globals())


def _step(
    stage: Stage,
    cache: LatentCache,
    dispatch: ExpertDispatch,
    x: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    tables_nB: Tensor,
    lengths_n: Tensor,
) -> Tensor:
    seq_lens = (1,) * len(positions_T)
    batch = PagedBatch(
        positions_T=positions_T,
        slots_T=slots_T,
        seq_lens=seq_lens,
        together=SingleRows(rows_n=None, tables_nB=tables_nB, lengths_n=lengths_n),
        parts=(),
        unsort_T=None,
    )
    ctx = ForwardContext(
        positions_T=positions_T,
        seq_lens=seq_lens,
        attention=PagedAttention(cache, batch),
        dispatch=dispatch,
    )
    hidden_TD = stage(stage.embed(x, ctx) if stage.is_first else x, ctx)
    return stage.norm(hidden_TD) if stage.is_last else hidden_TD
