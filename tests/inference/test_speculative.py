"""Drafts: those of the MTP modules as training runs them, and which of them are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.drafting import BLOCK, PROMPT, Request, make_runner, run, spec
from support.models import tiny_config, training_context, whole_model
from torch import Tensor

from dualray.inference.plan import Drafting, Sampled, SequencePlan
from dualray.inference.speculative import accepted, row_by_row
from dualray.model.stage import Stage


class Twin:
    """The modules as training runs them: dense attention over everything, all rows at once.

    Rows that were run before a token ahead of them was known keep the draft that stood there.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._ahead: list[list[int]] = [[] for _ in stage.mtp_modules()]

    @torch.no_grad()
    def propose(self, ids: Sequence[int], num_drafts: int) -> list[int]:
        """Greedy drafts behind `ids`, whose last token has not been run."""
        stage, modules = self._stage, self._stage.mtp_modules()
        ctx = training_context(stage.config, (len(ids) - 1,))
        hidden = stage.norm(stage(stage.embed(torch.tensor(ids[:-1]), ctx), ctx))
        drafts: list[int] = []
        for depth, module in enumerate(modules):
            rows = self._ahead[depth]
            rows += [*ids, *drafts][1 + depth + len(rows) :][: len(ids) - 1 - len(rows)]
            before, hidden = hidden, self._predict(module, rows, hidden)
            drafts.append(self._likeliest(hidden))
        inputs = list(self._ahead[-1])
        while len(drafts) < num_drafts:
            before, inputs = torch.cat((before, hidden[-1:])), [*inputs, drafts[-1]]
            hidden = self._predict(modules[-1], inputs, before)
            drafts.append(self._likeliest(hidden))
        return drafts[:num_drafts]

    def _predict(self, module, ids: Sequence[int], hidden_TD: Tensor) -> Tensor:
        ctx = training_context(self._stage.config, (len(ids),))
        ctx.cos_sin = self._stage.rope.cos_sin(ctx.positions_T, hidden_TD.dtype)
        return module.predict(self._stage.embed(torch.tensor(ids), ctx), hidden_TD, ctx)

    def _likeliest(self, hidden_TD: Tensor) -> int:
        return int(self._stage.head(hidden_TD[-1:]).argmax())


@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("num_drafts", [1, 2, 4])
@pytest.mark.parametrize("parts", [(10,), (3, 5, 2)])
def test_drafts_are_those_of_the_modules_as_training_runs_them(modules, num_drafts, parts):
    stage = whole_model(tiny_config(num_nextn_predict_layers=modules), dtype=torch.float64)
    asked = {"modules": modules, "num_drafts": lambda position: num_drafts}
    request = Request("a", range(20), parts=parts, **asked)
    # A second one in other blocks, and NaN in those that nobody has written.
    other = Request("b", range(20, 40), prompt=PROMPT[:3], parts=(3,), modules=modules)
    runner = make_runner(stage)
    for blocks in runner.cache.layers.values():
        blocks.fill_(float("nan"))
    run(runner, [request, other], 36)
    twin = Twin(stage)
    for length, drafts in request.proposed:
        assert list(drafts) == twin.propose(request.ids[:length], num_drafts), length
    assert len(request.proposed) > 8
    assert len({drafts[-1] for _, drafts in request.proposed}) > 4


def test_modules_attend_from_the_windows_first_position_on():
    """As if the request began there, but for the positions, which are those of the whole."""
    stage = whole_model(tiny_config(num_nextn_predict_layers=1), dtype=torch.float64)
    runner = make_runner(stage)
    for blocks in runner.cache.layers.values():
        blocks.fill_(float("nan"))
    window = 2 * BLOCK
    request = Request("a", range(20), parts=(3, 7), window=window, num_drafts=lambda position: 1)
    run(runner, [request], 30)
    module, rope = stage.mtp_modules()[0], stage.rope
    rows = runner.cache.layers[module.layer].isnan().all(-1).flatten()
    # In front of the window there may be blocks of others, whose modules have run them.
    assert rows[:window].all()
    assert not rows[window : request.num_run].any()
    for length, drafts in request.proposed:
        ids = torch.tensor(request.ids[:length])
        ctx = training_context(stage.config, (length - 1,))
        with torch.no_grad():
            hidden = stage.norm(stage(stage.embed(ids[:-1], ctx), ctx))[window:]
            ctx = training_context(stage.config, (len(hidden),))
            ctx.cos_sin = rope.cos_sin(torch.arange(window, length - 1), hidden.dtype)
            out = module.predict(stage.embed(ids[window + 1 :], ctx), hidden, ctx)
            assert drafts == (int(stage.head(out[-1:]).argmax()),)
    assert len(request.proposed) > 8


def planned(name: str, ids: Sequence[int], num_samples: int, first=5) -> SequencePlan:
    return SequencePlan(
        request_id=name,
        ids=tuple(ids),
        first_position=first,
        block_table=(0, 1, 2),
        samples=tuple(spec(first + len(ids) + i) for i in range(num_samples)),
    )


def said(name: str, *ids: int) -> list[Sampled]:
    return [Sampled(request_id=name, token_id=i, logprob=-1.0, rank=1) for i in ids]


@pytest.mark.parametrize(
    ("ids", "chosen", "kept"),
    [
        ((7,), (9,), 1),
        ((7, 9), (9, 4), 2),
        ((7, 8), (9, 4), 1),
        ((7, 9, 4, 1), (9, 4, 2, 1), 3),
        # What comes behind a draft that was not chosen counts for nothing, right or not.
        ((7, 8, 4, 1), (9, 4, 1, 6), 1),
        ((7, 9, 4, 1), (9, 4, 1, 6), 4),
    ],
)
def test_drafts_are_accepted_up_to_the_first_that_was_not_chosen(ids, chosen, kept):
    prompt, decoding = planned("p", (1, 2, 3), 0), planned("d", ids, len(ids))
    ending = planned("e", (1, 2, 3), 1)
    sampled = said("d", *chosen) + said("e", 2)
    got = accepted([prompt, decoding, ending], sampled)
    assert got == [[], sampled[:kept], sampled[-1:]]


def test_rows_that_verify_are_taken_apart_and_others_are_not():
    prompt, decoding, single = (
        planned("p", (1, 2), 1),
        planned("d", (7, 8), 2),
        planned("s", (4,), 1),
    )
    first, second = (
        SequencePlan(
            request_id="d",
            ids=(token,),
            first_position=5 + i,
            block_table=(0, 1, 2),
            samples=(spec(7 + i),),
        )
        for i, token in enumerate((7, 8))
    )
    assert row_by_row([prompt, decoding, single]) == [prompt, first, second, single]


def test_a_stage_without_sequences_walks_the_modules_on_no_rows():
    """The other expert ranks wait for it in every exchange."""
    stage = whole_model(tiny_config())
    walked = []
    for module in stage.mtp_modules():
        module.register_forward_hook(lambda m, args, out: walked.append((m.layer, len(out))))
    assert make_runner(stage).run([], None, draft_passes=3).sampled == []
    assert walked == [(4, 0), (5, 0), (5, 0)]


def test_sequences_that_want_fewer_drafts_stop_earlier():
    stage = whole_model(tiny_config(num_nextn_predict_layers=1))
    wants = {"a": 3, "b": 0, "c": 1}
    plans = [
        SequencePlan(
            request_id=name,
            ids=PROMPT,
            first_position=0,
            block_table=tuple(range(5 * i, 5 * i + 5)),
            samples=(spec(len(PROMPT)),),
            drafting=Drafting(first_position=0, num_drafts=count, num_passes=count),
        )
        for i, (name, count) in enumerate(wants.items())
    ]
    tokens = make_runner(stage).run(plans, None, draft_passes=3).sampled
    assert [len(token.draft_ids) for token in tokens] == [3, 0, 1]
    assert len({token.token_id for token in tokens}) == 1
    assert tokens[2].draft_ids == tokens[0].draft_ids[:1]
