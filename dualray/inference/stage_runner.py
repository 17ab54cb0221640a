"""One held stage copy over the sequences of its owner.

Embeds where it is the first stage, chooses tokens where it is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualray.inference.batch_invariant import (
    ROWS,
    RealRowsDispatch,
    check_device,
    one_row_each,
    pad_rows,
)
from dualray.inference.compiled_decode import CompiledDecode
from dualray.inference.latent_cache import LatentCache, PagedAttention, PagedBatch
from dualray.inference.plan import PromptScored, Sampled, SampleSpec, SequencePlan
from dualray.inference.prompt_scores import score_prompts
from dualray.inference.sampler import sample
from dualray.inference.scoring import LOGITS_BUDGET
from dualray.inference.speculative import Drafter, accepted, row_by_row
from dualray.inference.step_threads import step_threads
from dualray.model.context import ExpertDispatch, ForwardContext, RoutingTape
from dualray.model.stage import Stage


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """What the next stage reads (T, D), and the tokens that the last one scored and chose."""

    hidden_TD: Tensor
    sampled: list[Sampled]
    scored: list[PromptScored]


class StageRunner:
    """One held stage with its latent cache. Runs without gradients.

    `dispatch` is the direction's own. A stage that gets no sequences still runs its layers
    on zero tokens: the other expert ranks wait for it in every exchange. Steps that run up to
    `compile_batch` rows, each of which chooses a token, are compiled here, once, which takes
    minutes; 0 for none. A last stage drafts with its first `draft_modules` MTP modules, each of
    which has a cache like a layer's. On a CPU steps of few rows take fewer of torch's threads than
    there are now (`step_threads`). With `invariant` a request gets the same bits whatever runs
    beside it (`batch_invariant`).
    """

    def __init__(
        self,
        stage: Stage,
        dispatch: ExpertDispatch,
        *,
        num_blocks: int,
        block_size: int,
        compile_batch: int = 0,
        draft_modules: int = 0,
        invariant: bool = False,
    ) -> None:
        assert not (compile_batch and invariant), "a compiled step has few rows"
        weight = stage.get_parameter(f"layers.{stage.layer_range.start}.self_attn.o_proj.weight")
        self.stage = stage
        self.device, self.dtype = weight.device, weight.dtype
        self._dispatch = dispatch
        self._invariant, self._padding_block = invariant, num_blocks
        # Bits depend on the number of threads.
        fewer_threads = self.device.type == "cpu" and not invariant
        self._threads = torch.get_num_threads() if fewer_threads else 1
        if invariant:
            check_device(self.device)
        modules = stage.mtp_modules()[:draft_modules] if stage.is_last else []
        self.cache = LatentCache(
            [*stage.layer_range, *(module.layer for module in modules)],
            num_blocks=num_blocks + (compile_batch > 0 or invariant),
            block_size=block_size,
            row_dim=stage.config.cache_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self._drafter = Drafter(stage, modules, self.cache, dispatch) if modules else None
        self._compiled: CompiledDecode | None = None
        if compile_batch:
            self._compiled = CompiledDecode(
                stage, self.cache, dispatch, max_batch=compile_batch, padding_block=num_blocks
            )
            self._compiled.warm_up()

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[SequencePlan],
        hidden_TD: Tensor | None,
        tape: RoutingTape | None = None,
        *,
        draft_passes: int = 0,
    ) -> StageOutput:
        """Runs the sequences' new tokens; `hidden_TD` is None for the first stage.

        `tape` records or replays the expert choices of this call's T rows. Behind a last stage's
        layers follow so many MTP modules.
        """
        num_rows = sum(len(sequence.ids) for sequence in sequences)
        with step_threads(num_rows, self._threads):
            return self._run(sequences, hidden_TD, tape, num_rows, draft_passes)

    def _run(
        self,
        sequences: Sequence[SequencePlan],
        hidden_TD: Tensor | None,
        tape: RoutingTape | None,
        num_rows: int,
        draft_passes: int,
    ) -> StageOutput:
        apart = row_by_row(sequences)
        scores = any(sequence.prompt is not None for sequence in sequences)
        plain = tape is None and not scores
        if self._compiled is not None and plain and self._compiled.takes(apart):
            out = self._compiled.run(apart, hidden_TD)
            if not self.stage.is_last:
                return StageOutput(hidden_TD=out, sampled=[], scored=[])
            sampled = self._say(out, sequences, draft_passes)
            return StageOutput(hidden_TD=out, sampled=sampled, scored=[])
        split, ctx = self._context(sequences, apart, num_rows, tape)
        if self.stage.is_first:
            ids = [token for sequence in split for token in sequence.ids]
            ids_T = torch.tensor(ids, dtype=torch.int64, device=self.device)
            hidden_TD = self.stage.embed(ids_T, ctx)
        assert hidden_TD is not None, "only the first stage has no input"
        hidden_TD = self.stage(pad_rows(hidden_TD) if self._invariant else hidden_TD, ctx)
        if not self.stage.is_last:
            return StageOutput(hidden_TD=hidden_TD[:num_rows], sampled=[], scored=[])
        normed_TD = self.stage.norm(hidden_TD)
        at_once = max(ROWS, LOGITS_BUDGET // self.stage.config.vocab_size)
        scored = score_prompts(self._head, normed_TD, sequences, rows_at_once=at_once)
        sampled = self._say(normed_TD, sequences, draft_passes)
        return StageOutput(hidden_TD=hidden_TD[:num_rows], sampled=sampled, scored=scored)

    def _context(
        self,
        sequences: Sequence[SequencePlan],
        apart: Sequence[SequencePlan],
        num_rows: int,
        tape: RoutingTape | None,
    ) -> tuple[Sequence[SequencePlan], ForwardContext]:
        """The rows as they attend, padding included, and what the layers are told of them."""
        # Where starting a kernel is dear, rows that attend in one call; else fewer, larger calls.
        split = sequences if self.device.type == "cpu" else apart
        together, dispatch = None, self._dispatch
        if self._invariant:
            split, together = one_row_each(sequences, self._padding_block), False
            dispatch = RealRowsDispatch(dispatch, num_rows)
        batch = PagedBatch.build(split, self.cache.block_size, self.device, together=together)
        ctx = ForwardContext(
            positions_T=batch.positions_T,
            seq_lens=batch.seq_lens,
            attention=PagedAttention(self.cache, batch, aligned=self._invariant),
            dispatch=dispatch,
            tape=tape,
        )
        return split, ctx

    def _head(self, normed_ND: Tensor) -> Tensor:
        """Logits (N, vocab)."""
        if not self._invariant:
            return self.stage.head(normed_ND)
        return self.stage.head(pad_rows(normed_ND))[: len(normed_ND)]

    def _say(
        self, normed_TD: Tensor, sequences: Sequence[SequencePlan], draft_passes: int
    ) -> list[Sampled]:
        """The tokens that stand, each sequence's last one with drafts of what may follow."""
        ends, asked = _asked(sequences)
        sampled: list[Sampled] = []
        if asked:
            logits_BV = self._head(normed_TD[ends])
            if self._invariant:
                parts = [sample(logits_BV[i : i + 1], [how]) for i, how in enumerate(asked)]
                sampled = [token for part in parts for token in part]
            else:
                sampled = sample(logits_BV, asked)
        tokens = accepted(sequences, sampled)
        if draft_passes:
            assert self._drafter is not None, "the plan asks for drafts, which are switched off"
            drafts = self._drafter.propose(normed_TD, sequences, tokens, draft_passes)
            for stands, ids in zip(tokens, drafts):
                if stands and ids:
                    stands[-1] = replace(stands[-1], draft_ids=ids)
        return [token for stands in tokens for token in stands]


def _asked(sequences: Sequence[SequencePlan]) -> tuple[list[int], list[tuple[str, SampleSpec]]]:
    """Rows behind which a token is to be chosen, and how: a sequence's last ones."""
    ends: list[int] = []
    asked = []
    stop = 0
    for sequence in sequences:
        stop += len(sequence.ids)
        ends += range(stop - len(sequence.samples), stop)
        asked += [(sequence.request_id, spec) for spec in sequence.samples]
    return ends, asked
