"""How far a run drafts: setting `serve.draft_tokens` against the model that serves."""

from __future__ import annotations

from dualray.errors import ConfigError

MAX_DRAFTS = 8
DEFAULT_DRAFTS = 3
"""Of the demo's model a fourth draft in a row comes true one time in five, if the one module is
asked again and again."""


def check_drafts(draft_tokens: int | None, compile_batch: int) -> None:
    """Raises ConfigError. Whether the model has MTP modules shows with the model."""
    if draft_tokens is None:
        return
    if not 0 <= draft_tokens <= MAX_DRAFTS:
        raise ConfigError(
            f"serve.draft_tokens is {draft_tokens} and must lie between 0 and {MAX_DRAFTS}",
            hint="leave it out for as many as pay, or set it to 0 for none",
        )
    if 0 < compile_batch <= draft_tokens:
        raise ConfigError(
            f"serve.draft_tokens is {draft_tokens} and serve.compile_batch {compile_batch}, but a "
            f"step that verifies them runs {draft_tokens + 1} rows of a sequence",
            hint=f"set serve.compile_batch to {draft_tokens + 1} or more, or drop one of the two",
        )


def most_drafts(draft_tokens: int | None, compile_batch: int, num_modules: int) -> int:
    """Most drafts behind a sequence of a model with so many MTP modules.

    Raises:
        ConfigError: drafts are asked for and there is no module.
    """
    if draft_tokens is None:
        return DEFAULT_DRAFTS if num_modules and not compile_batch else 0
    if draft_tokens and not num_modules:
        raise ConfigError(
            f"serve.draft_tokens is {draft_tokens} and model.num_nextn_predict_layers is 0, but "
            "drafts come from MTP modules",
            hint="leave serve.draft_tokens out, or train a model with num_nextn_predict_layers: 1",
        )
    return draft_tokens
