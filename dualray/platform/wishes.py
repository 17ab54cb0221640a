"""What clients want of a running run: that it ends, or that it switches its mode.

Clients wait in threads of their own; the thread that lives the run looks here between steps, and
answers.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.errors import RunError
from dualray.platform.modes import Mode


@dataclass
class _Wish:
    mode: Mode
    answer: ModeAnswer | Refusal | None = None


class Wishes:
    """One wish for a mode at a time; the end of the run is above all."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._stop = False
        self._wish: _Wish | None = None
        self._over: Refusal | None = None

    def stop(self) -> None:
        """The run shall end; whoever waits for a mode is told."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self.close(f"run {self._name} is stopping", "start it again")

    @property
    def must_stop(self) -> bool:
        return self._stop

    def ask(self, mode: Mode) -> ModeAnswer | Refusal:
        """Waits until the run has answered. Raises RunError if somebody else waits already."""
        wish = _Wish(mode)
        with self._changed:
            if self._over is not None:
                return self._over
            if self._wish is not None:
                raise RunError(
                    f"run {self._name} is switching to {self._wish.mode} at present",
                    hint="wait and ask again",
                )
            self._wish = wish
            self._changed.notify_all()
            self._changed.wait_for(lambda: wish.answer is not None)
        assert wish.answer is not None
        return wish.answer

    @property
    def mode(self) -> Mode | None:
        """What somebody waits for."""
        wish = self._wish
        return None if wish is None else wish.mode

    def wait(self, timeout_s: float) -> None:
        """Returns as soon as there is a wish."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._wish is not None, timeout_s)

    def answer(self, answer: ModeAnswer | Refusal) -> None:
        """Tells who waits, if there is one."""
        with self._changed:
            if self._wish is not None:
                self._wish.answer = answer
                self._wish = None
                self._changed.notify_all()

    def close(self, sentence: str, hint: str) -> None:
        """Refuses the present wish, and all that come from now on; the first reason stays."""
        with self._changed:
            if self._over is None:
                self._over = Refusal(sentence=sentence, hint=hint)
            self.answer(self._over)
