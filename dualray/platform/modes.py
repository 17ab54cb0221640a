"""What a run does, and what it may be asked to do instead: decided without any process."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum

from dualray.actors.mode_answer import ModeAnswer
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


def already(now: Situation, *, ended_pause: bool = False) -> ModeAnswer:
    """The answer to who asks for the mode that the run is in.

    `ended_pause`: it had been told to pause generation, and was told to go on.
    """
    goes_on = ", and its generation, which was paused, goes on" if ended_pause else ""
    return ModeAnswer(
        mode=str(now.mode),
        switched=False,
        step=now.steps_done,
        sentences=(f"run {now.name} {_DOES[now.mode]} already{goes_on}",),
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
