"""Speculative decoding with the model's own MTP modules (arXiv 2412.19437, sections 2.2, 5.4.3).

**Drafts.** Once a step has chosen tokens, the last stage walks the MTP modules over the rows that
stand and proposes what comes next. Module k joins a row's hidden state of depth k - 1 with the
token k places ahead, as in training; behind the last module the same one goes on, a position
later, on its own hidden state. The next step runs the proposals behind the token that was chosen
last, which costs little more than that token alone.

**Verification.** Behind every row the sampler chooses the token that the model itself would choose
there. A draft is accepted if it is what the row before it chose; what comes behind the first
one that is not was computed behind a token that nobody said, and is dropped.

**Exactness.** Let c_t = f(l_t, e_t) be the choice at position t: f is deterministic, the logits l_t
are a function of the tokens before t, and the noise e_t is one of (seed, t), independent over
t. A row is kept only if every token before it is the chosen one. So the l_t of every kept row
are those of the very tokens chosen, and by induction over t the output is c_1, c_2, ...
whatever was drafted: token for token what comes without drafts, greedy or drawn, and hence with the
same distribution. (Where a row's logits depend in their last bits on how many rows share a product,
a tie may fall the other way, as it may for other batch companions.)

**Acceptance.** Noise that does not depend on drafts could still be shared with them: a draft is
drawn with the e_t of the position it is for, under the request's own temperature and cuts. Two
distributions that race with equal noise agree with probability (1 - TV) / (1 + TV) at least, TV
their total variation distance (arXiv 2408.07978; no scheme in which drafts cannot touch the output
promises more, arXiv 1612.01041). The rule of arXiv 2211.17192, which keeps a draft with
probability min(1, p / q) and else draws from what p has above q, agrees with probability 1 - TV.
It has the same distribution as output, but not the same output: another number of drafts gives
another completion for the same seed, and q must be kept until the draft is judged. Here a plan
carries ids alone, and a request answers the same however busy the server is. At temperature 0 the
two rules are one.

**Rows that do not stand.** They were written to the cache behind the last kept token and are
overwritten by the next step before anything attends to them. So are those of modules that went
on behind the last one. An MTP module attends from `Drafting.first_position` on, to rows that this
request has written without a gap: no row of an earlier request, NaN or not, is ever read. What the
modules make can only change which drafts are proposed, never what is said.

T rows of a step, S of them that walk the modules, W sequences that do, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from dualray.inference.latent_cache import LatentCache, PagedAttention, PagedBatch
from dualray.inference.plan import Sampled, SampleSpec, SequencePlan
from dualray.inference.sampler import choose
from dualray.model.context import ExpertDispatch, ForwardContext
from dualray.model.mtp import MtpModule
from dualray.model.stage import Stage


def accepted(sequences: Sequence[SequencePlan], sampled: Sequence[Sampled]) -> list[list[Sampled]]:
    """By sequence the tokens that stand, of one `sampled` for each of its `samples`."""
    kept = []
    start = 0
    for sequence in sequences:
        count = len(sequence.samples)
        drafts = sequence.ids[len(sequence.ids) - count + 1 :] if count else ()
        tokens = list(sampled[start : start + count])
        start += count
        stands = 1
        while stands < count and tokens[stands - 1].token_id == drafts[stands - 1]:
            stands += 1
        kept.append(tokens[:stands])
    return kept


def row_by_row(sequences: Sequence[SequencePlan]) -> list[SequencePlan]:
    """The same rows in the same order, a sequence for each row of those that only verify.

    A layer writes all its rows to the cache before any of them attends, so that such rows see each
    other. They are then attended like single tokens, in one call.
    """
    apart: list[SequencePlan] = []
    for plan in sequences:
        if not 1 < len(plan.ids) == len(plan.samples):
            apart.append(plan)
            continue
        apart += [
            replace(plan, ids=(token,), first_position=plan.first_position + i, samples=(spec,))
            for i, (token, spec) in enumerate(zip(plan.ids, plan.samples))
        ]
    return apart


@dataclass(kw_only=True)
class _Walk:
    """One sequence on its way through the modules."""

    plan: SequencePlan
    rows: range
    """Its rows among the step's T that stand and that the modules run."""
    first_position: int
    """Position of the first of them."""
    ahead: list[int]
    """The token behind each of the rows, then more that are known, drafts above all."""
    num_drafts: int
    spec: SampleSpec | None
    """How the token in front of the drafts was chosen; None if none was."""

    @classmethod
    def begin(cls, plan: SequencePlan, start: int, tokens: list[Sampled]) -> _Walk | None:
        """`start` is the first of its rows; None if the modules run none of them."""
        if plan.drafting is None:
            return None
        stands = len(plan.ids) - len(plan.samples) + len(tokens)
        skipped = max(0, plan.drafting.first_position - plan.first_position)
        if stands <= skipped:
            return None
        behind = [tokens[-1].token_id] if tokens else plan.drafting.next_ids
        return cls(
            plan=plan,
            rows=range(start + skipped, start + stands),
            first_position=plan.first_position + skipped,
            ahead=[*plan.ids[skipped + 1 : stands], *behind],
            num_drafts=plan.drafting.num_drafts if tokens else 0,
            spec=plan.samples[len(tokens) - 1] if tokens else None,
        )

    @property
    def drafts(self) -> tuple[int, ...]:
        return tuple(self.ahead[len(self.rows) :]) if self.num_drafts else ()

    def tokens_ahead(self, depth: int) -> list[int]:
        """The token `depth` places ahead of each row. Where that is not known yet any does: a
        module that has misread a row drafts worse and nothing else."""
        known = self.ahead[depth - 1 : depth - 1 + len(self.rows)]
        return known + [0] * (len(self.rows) - len(known))

    def at(self, position: int, count: int, block_size: int) -> SequencePlan:
        """So many rows from `position` on, counted from where the modules attend from."""
        assert self.plan.drafting is not None
        start = self.plan.drafting.first_position
        return SequencePlan(
            request_id=self.plan.request_id,
            ids=(0,) * count,
            first_position=position - start,
            block_table=self.plan.block_table[start // block_size :],
            samples=(),
        )


class Drafter:
    """MTP modules of a last stage over its cache, which holds their layers too.

    `dispatch` is the direction's own.
    """

    def __init__(
        self,
        stage: Stage,
        modules: Sequence[MtpModule],
        cache: LatentCache,
        dispatch: ExpertDispatch,
    ) -> None:
        self._stage, self._cache, self._dispatch = stage, cache, dispatch
        self._modules = modules

    def propose(
        self,
        normed_TD: Tensor,
        sequences: Sequence[SequencePlan],
        tokens: Sequence[list[Sampled]],
        num_passes: int,
    ) -> list[tuple[int, ...]]:
        """Drafts of each sequence, of which `tokens` stand. A collective of the expert ranks.

        `normed_TD` are the normalised hidden states of all the step's rows.
        """
        walks: list[_Walk | None] = []
        start = 0
        for sequence, stands in zip(sequences, tokens):
            walks.append(_Walk.begin(sequence, start, stands))
            start += len(sequence.ids)
        going = [walk for walk in walks if walk is not None]
        lasts = [end - 1 for end in accumulate(len(walk.rows) for walk in going)]
        hidden_SD = _pick(normed_TD, [row for walk in going for row in walk.rows])
        last_WD = hidden_SD
        ctx = self._context(going, [(walk.first_position, len(walk.rows)) for walk in going])
        for depth, module in enumerate(self._modules[:num_passes], start=1):
            ids = [token for walk in going for token in walk.tokens_ahead(depth)]
            hidden_SD = module.predict(self._embed(ids, ctx), hidden_SD, ctx)
            last_WD = _pick(hidden_SD, lasts)
            self._draw(going, last_WD, depth)
        for depth in range(len(self._modules) + 1, num_passes + 1):
            wanted = [i for i, walk in enumerate(going) if walk.num_drafts >= depth]
            going, last_WD = [going[i] for i in wanted], _pick(last_WD, wanted)
            beyond = depth - len(self._modules)
            ctx = self._context(
                going, [(walk.first_position + len(walk.rows) - 1 + beyond, 1) for walk in going]
            )
            ids = [walk.ahead[-1] for walk in going]
            last_WD = self._modules[-1].predict(self._embed(ids, ctx), last_WD, ctx)
            self._draw(going, last_WD, depth)
        return [() if walk is None else walk.drafts for walk in walks]

    def _embed(self, ids: list[int], ctx: ForwardContext) -> Tensor:
        device = ctx.positions_T.device
        return self._stage.embed(torch.tensor(ids, dtype=torch.int64, device=device), ctx)

    def _context(self, walks: list[_Walk], places: list[tuple[int, int]]) -> ForwardContext:
        """For the rows at `places`, a (position, count) of each walk."""
        blocks, size = next(iter(self._cache.layers.values())), self._cache.block_size
        plans = [walk.at(first, count, size) for walk, (first, count) in zip(walks, places)]
        batch = PagedBatch.build(plans, size, blocks.device)
        positions = [at for first, count in places for at in range(first, first + count)]
        positions_S = torch.tensor(positions, dtype=torch.int64, device=blocks.device)
        return ForwardContext(
            positions_T=positions_S,
            seq_lens=batch.seq_lens,
            attention=PagedAttention(self._cache, batch),
            dispatch=self._dispatch,
            cos_sin=self._stage.rope.cos_sin(positions_S, blocks.dtype),
        )

    def _draw(self, walks: list[_Walk], last_WD: Tensor, depth: int) -> None:
        """Adds draft `depth` to the walks that want as many; `last_WD` are their last rows."""
        wanted = [i for i, walk in enumerate(walks) if walk.num_drafts >= depth]
        if not wanted:
            return
        specs = []
        for i in wanted:
            spec = walks[i].spec
            assert spec is not None, "drafts come behind a chosen token"
            # What a grammar allowed there says nothing of what it allows here.
            adjust = None if spec.adjust is None else replace(spec.adjust, allowed=b"")
            specs.append(replace(spec, position=spec.position + depth, adjust=adjust))
        drawn = choose(self._stage.head(_pick(last_WD, wanted)), specs).tolist()
        for i, token in zip(wanted, drawn):
            walks[i].ahead.append(token)


def _pick(rows_SD: Tensor, indices: list[int]) -> Tensor:
    """These of the rows; a view where they are neighbours, as a single sequence's are."""
    if indices and indices[-1] - indices[0] == len(indices) - 1:
        return rows_SD[indices[0] : indices[-1] + 1]
    return rows_SD[indices]
