"""A needle in a haystack: one line hidden in held-out text, and asked for at the end.

The line says "The secret word is WORD."; the text ends with "The secret word is", and WORD is
what should follow. A model that merely knows which words are likely is no help, so the same
text without the line is scored too: what counts is how much more likely the line makes WORD.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dualray.data.dataset import TokenDataset
from dualray.inference.scoring import packs, run_pack
from dualray.model.stage import Stage

DEPTHS = (0.1, 0.5, 0.9)
"""Where the line is put, as a fraction of the text in front of the question."""
_CLAIM, _END = "\nThe secret word is", ".\n"
_TOKEN_BUDGET = 4096
_LEAST_TEXT = 16
"""Tokens of other text that a trial has at least."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The same question with the line before it and without; both end with the answer's tokens."""

    with_line: tuple[int, ...]
    without: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Means over trials: how much the line helps, and how often greedy decoding finds the word."""

    gain: float
    """ln p(word) with the line minus without, nats; 0 is what no look at the line gives."""
    exact: float
    """Share of trials in which every token of the word is the most likely one, line given."""
    exact_without: float
    """The same without the line: luck."""


def make_trials(
    dataset: TokenDataset, length: int, depth: float, count: int, *, seed: int = 0
) -> list[Trial]:
    """`count` trials of `length` tokens each, answer included; the same ones at every call.

    Words come from the held-out text, as does the hay. Empty where `length` has no room for a
    line and some text, or the held-out split is shorter.
    """
    tokenizer = dataset.tokenizer()
    hay_tokens = dataset.split("heldout").num_tokens
    words = _words(dataset)
    rng = random.Random(f"{seed}/{length}/{depth}")
    claim, end = tokenizer.encode(_CLAIM), tokenizer.encode(_END)
    trials = []
    for _ in range(count if words else 0):
        answer = tokenizer.encode(" " + rng.choice(words))
        question = [*claim, *answer]
        line = [*claim, *answer, *end]
        room = length - len(question)
        if room - len(line) < _LEAST_TEXT or hay_tokens < room:
            return []
        start = rng.randrange(hay_tokens - room + 1)
        hay = dataset.tokens("heldout", start, room).tolist()
        # Both have the same length, so that the question stands at the same positions.
        rest = hay[len(line) :]
        at = round(depth * len(rest))
        trials.append(
            Trial(
                with_line=(*rest[:at], *line, *rest[at:], *question),
                without=(*hay, *question),
                answer_tokens=len(answer),
            )
        )
    return trials


def _words(dataset: TokenDataset) -> list[str]:
    text = dataset.heldout_text().decode(errors="replace")
    return sorted({word.lower() for word in re.findall(r"\b[A-Za-z]{4,8}\b", text)})


def retrieve(stage: Stage, trials: Sequence[Trial]) -> Retrieval:
    """What `stage`, which holds the whole model, makes of the trials."""
    assert trials, "no trial"
    counts = [trial.answer_tokens for trial in trials]
    found = _answers(stage, [trial.with_line for trial in trials], counts)
    luck = _answers(stage, [trial.without for trial in trials], counts)
    gains = [chance - before for (chance, _), (before, _) in zip(found, luck)]
    return Retrieval(
        gain=sum(gains) / len(trials),
        exact=sum(exact for _, exact in found) / len(trials),
        exact_without=sum(exact for _, exact in luck) / len(trials),
    )


@torch.no_grad()
def _answers(
    stage: Stage, sequences: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[tuple[float, bool]]:
    """For each sequence, of its last so many tokens: ln p, and whether each is the likeliest."""
    remaining, results = iter(counts), []
    for pack in packs(sequences, _TOKEN_BUDGET):
        ids_T, hidden_TD, ctx = run_pack(stage, pack)
        start = 0
        for sequence in pack:
            start += len(sequence)
            answer = slice(start - next(remaining), start)
            asked = slice(answer.start - 1, answer.stop - 1)
            logits = stage.head(hidden_TD[asked], ctx).float()
            chances = logits.log_softmax(-1).gather(1, ids_T[answer, None])
            exact = bool((logits.argmax(-1) == ids_T[answer]).all())
            results.append((float(chances.sum()), exact))
    return results
