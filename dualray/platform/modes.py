"""What a run does, and what it may be asked to do instead: decided without any process."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum

from dualray.errors import ConfigError, RunError


class Mode(StrEnum):
    """What a run does, from one switch to the next."""

    TRAIN = "train"
    SERVE = "serve"
    PAUSE = "pause"
    """Neither: accepted requests have ended, weights stay."""


_DOES = {Mode.TRAIN: "trains", Mode.SERVE: "serves", Mode.PAUSE: "is paused"}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that decides whether a run may switch."""

    name: str
    mode: Mode
    trains: bool
    """False for a run that serves a checkpoint only."""
    steps_done: int
    end_step: int
    """Optimizer steps of the whole run."""
    lost_replicas: tuple[int, ...] = ()
    """Replicas whose workers have died while others serve."""
    lacks_checkpoint: bool = False
    """Optimizer state was dropped, and no committed checkpoint has that of the step."""


@dataclass(frozen=True, kw_only=True)
class ModeAnswer:
    """What became of a request for a mode. Plain values: it travels between processes."""

    mode: str
    """The one that the run is in now."""
    switched: bool
    """False if it was in that mode already."""
    step: int
    """Optimizer steps done."""
    sentences: tuple[str, ...]
    """What happened, for a person."""
    came_from: str | None = None
    """The mode before the switch."""
    target: str | None = None
    """HOST:PORT at which the run serves now."""
    first_token_s: float | None = None
    """Seconds from the last optimizer step, or from the end of a pause, to the first token."""
    first_step_s: float | None = None
    """Seconds from when the workers were free to the end of the first optimizer step."""
    drain_s: float | None = None
    """Seconds in which accepted requests ended."""
    num_cut: int = 0
    """Accepted requests that did not end in time."""
    optimizer: str | None = None
    """Where optimizer state is: keep, park or drop."""
    kept_bytes: tuple[int, ...] = ()
    """Optimizer state that stays where training uses it, by worker."""
    parked_bytes: tuple[int, ...] = ()
    dropped_bytes: tuple[int, ...] = ()
    gradient_bytes: tuple[int, ...] = ()
    """Gradient buffers that were given back, by worker."""
    cache_bytes: tuple[int, ...] = ()
    """Latent cache, by worker."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a run does not switch."""

    sentence: str
    hint: str


def mode_of(text: str) -> Mode:
    """Raises ConfigError if there is no such mode."""
    try:
        return Mode(text)
    except ValueError:
        close = difflib.get_close_matches(text, list(Mode), n=1, cutoff=0.5)
        raise ConfigError(
            f"MODE is {text} and must be train, serve or pause",
            hint=f"did you mean {close[0]}?" if close else "write dualray mode RUN serve",
        ) from None


def must_switch(asked: Mode, now: Situation) -> bool:
    """False if the run is in that mode already. Raises RunError if it cannot be in it."""
    if asked is now.mode:
        return False
    if now.lost_replicas:
        lost = ", ".join(map(str, now.lost_replicas))
        raise RunError(
            f"run {now.name} has lost replica {lost} and can only go on serving",
            hint="stop it and start it again, from its last checkpoint with --resume",
        )
    if asked is Mode.TRAIN:
        _refuse_to_train(now)
    return True


def already(now: Situation) -> ModeAnswer:
    """The answer to who asks for the mode that the run is in."""
    return ModeAnswer(
        mode=str(now.mode),
        switched=False,
        step=now.steps_done,
        sentences=(f"run {now.name} {_DOES[now.mode]} already",),
    )


def _refuse_to_train(now: Situation) -> None:
    if not now.trains:
        raise RunError(
            f"run {now.name} serves a checkpoint and has neither data nor optimizer state, so it "
            "cannot train",
            hint="train with `dualray train`, from the checkpoint with train.init_from or --resume",
        )
    if now.steps_done >= now.end_step:
        raise RunError(
            f"run {now.name} has made all of its {now.end_step} optimizer steps, so there is none "
            "left to train",
            hint="stop it, raise train.steps and continue it with --resume",
        )
    if now.lacks_checkpoint:
        raise RunError(
            f"run {now.name} dropped its optimizer state after step {now.steps_done} and has no "
            "committed checkpoint of that step that is whole, so training cannot go on from there",
            hint="serve on, or stop it and continue it from an older checkpoint with --resume",
        )
