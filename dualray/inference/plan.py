"""One engine step as plain data: what every owner runs, and what came out.

The scheduler writes a `StepPlan`, the workers read it, `Sampled` goes back. Only ids and
numbers travel; tensors stay in the workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Owner(NamedTuple):
    """Who holds a request's latent cache, to its end or until it is preempted.

    Expert ranks are data-parallel to each other outside the routed experts, and each
    direction of the pipeline has its own stage copies, hence its own cache.
    """

    replica: int
    expert: int
    direction: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Adjustment:
    """What changes a token's logits before temperature and cuts, in the order of the fields.

    No token id comes twice in a field but `draft_ids`. The rows of one sequence have their
    `seen_ids` and `output_counts` in common, the same objects, so that pickle writes them once.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of `seen_ids` and multiplies the others."""
    seen_ids: tuple[int, ...] = ()
    """Tokens of prompt and completion."""
    frequency_penalty: float = 0.0
    """Taken from a logit once for every time that its token was chosen."""
    presence_penalty: float = 0.0
    """Taken from a logit once if its token was chosen at all."""
    output_counts: tuple[tuple[int, int], ...] = ()
    """(token id, how often) over the completion; the prompt does not count."""
    draft_ids: tuple[int, ...] = ()
    """Drafts in front of the token. They were seen and chosen too, beside the two fields above."""
    banned_ids: tuple[int, ...] = ()
    """Ids that must not be chosen (stop tokens before min_tokens); the last ones may, if these are
    the whole vocabulary."""
    allowed: bytes = b""
    """Ids to choose from, at least one of them, packed (`token_masks`); empty for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpec:
    """How to choose the token behind a row."""

    position: int
    """Position of the token to choose; with `seed` it fixes the random number."""
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    logprobs: int | None
    """Alternatives to report; None reports the chosen token's log-probability only."""
    adjust: Adjustment | None = None
    """None leaves the logits as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSpec:
    """Prompt tokens to score, given those before them."""

    targets: tuple[int, ...]
    """The token behind each of a sequence's first rows, one by one."""
    logprobs: int
    """Alternatives to report per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafting:
    """How a sequence goes through the MTP modules once its tokens are chosen (`speculative`)."""

    first_position: int
    """A multiple of the block size. The modules' caches hold this request's rows from here on, and
    nothing before it is attended to or run."""
    num_drafts: int
    """Tokens to propose behind the last one chosen; 0 while a part of the prompt is to come."""
    num_passes: int
    """Modules to walk, one after the other, `num_drafts` or more."""
    next_ids: tuple[int, ...] = ()
    """Tokens behind `ids` where none is chosen: the prompt's next ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencePlan:
    """Tokens of one request to run in this step."""

    request_id: str
    ids: tuple[int, ...]
    """Token ids: the prompt or a part of it, or the one token chosen last and drafts behind it."""
    first_position: int
    """Position of ids[0]; everything before it is in the cache."""
    block_table: tuple[int, ...]
    """Block ids in order of position; covers first_position + len(ids) tokens or more."""
    samples: tuple[SampleSpec, ...]
    """How to choose the token behind each of the last rows, one by one; none while a part of the
    prompt is still to come. Of several rows all but the first are drafts, which count only while
    they are what the row before them chose."""
    prompt: PromptSpec | None = None
    """None scores no prompt tokens."""
    drafting: Drafting | None = None
    """None walks no MTP module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step of every owner. Owners without work are absent."""

    step: int
    owners: dict[Owner, tuple[SequencePlan, ...]]

    def sequences(self, owner: Owner) -> tuple[SequencePlan, ...]:
        return self.owners.get(owner, ())

    def directions(self, replica: int) -> tuple[int, ...]:
        """Directions of a replica in which at least one expert rank has tokens.

        All workers of the replica walk exactly these, those without tokens too: the experts'
        all-to-all needs every expert rank.
        """
        return tuple(sorted({o.direction for o in self.owners if o.replica == replica}))

    def draft_passes(self, replica: int, direction: int) -> int:
        """MTP modules that every expert rank of the direction walks, with no token if need be.

        Decided here and not by what is accepted, which the other ranks do not know.
        """
        return max(
            (
                sequence.drafting.num_passes
                for owner, sequences in self.owners.items()
                if (owner.replica, owner.direction) == (replica, direction)
                for sequence in sequences
                if sequence.drafting is not None
            ),
            default=0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A token chosen for a request, whose tokens come in order.

    Log-probabilities are of the unscaled logits.
    """

    request_id: str
    token_id: int
    logprob: float
    rank: int
    """How many tokens are at least as likely, itself included: 1 is the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (id, log-probability) pairs, when asked for, likeliest first."""
    draft_ids: tuple[int, ...] = ()
    """What may come next, if this is the last token of its request in the step."""

    @property
    def is_nan(self) -> bool:
        """The model gave no number."""
        return math.isnan(self.logprob)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScored:
    """What the model gave a part of a prompt.

    Parts come in order; one that was run twice comes twice.
    """

    request_id: str
    first_position: int
    """Position of the first token told of, 1 or more: nothing comes before the prompt's first."""
    tokens: tuple[Sampled, ...]
    """The prompt's tokens as if they had been chosen."""

    @property
    def is_nan(self) -> bool:
        return any(token.is_nan for token in self.tokens)


Outcome = Sampled | PromptScored
"""What a step hands back, part by part."""
