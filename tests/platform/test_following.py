"""Following a run: signals, sentences and what is cleared away, with a fake Ray."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from dualray.errors import RunError
from dualray.platform import following as module
from dualray.platform.console import Console
from dualray.platform.events import Event, Note, StateChange
from dualray.platform.folder import RunFolder
from dualray.platform.following import Following, interrupts
from dualray.platform.states import RunState

STOPPED = StateChange(RunState.STOPPED)


class FakeRay:
    """A controller's answers in turn: events, or an error to raise; and a clock of its own."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = iter(answers)
        self.log: list[Any] = []
        self.now = 0.0
        self.head_answers = True
        self.events: list[Event] = []

    def get(self, ref: int, timeout: float) -> list[Event]:
        self.now += 1.0
        answer = next(self.answers)
        if isinstance(answer, Callable):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        self.events += answer or []
        return self.events[ref:]

    def kill(self, actor: Any) -> None:
        self.log.append(("killed", str(actor)))

    def get_actor(self, name: str, namespace: str) -> str:
        if name.endswith(".engine"):
            return name
        raise ValueError(name)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append("slept")


class FakeController(SimpleNamespace):
    def __repr__(self) -> str:
        return "controller"


class FakeConnection:
    address = "10.0.0.1:6379"

    def __init__(self, log: list[Any], *, embedded: bool) -> None:
        self.embedded = embedded
        self._log = log

    def kill(self) -> None:
        self._log.append("ray killed")

    def close(self) -> None:
        self._log.append("closed")


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """follow(answers) follows a run to its end; returns the fake Ray and what was printed."""

    def run(answers: list[Any], *, embedded: bool = False, head: bool = True):
        ray = FakeRay(answers)
        monkeypatch.setattr(module, "ray", ray)
        monkeypatch.setattr(module, "time", ray)
        monkeypatch.setattr(module, "answers", lambda address: head)
        monkeypatch.setattr(
            module, "remove_placement_group", lambda group: ray.log.append(("removed", group))
        )
        controller = FakeController(
            poll=SimpleNamespace(remote=lambda first, timeout: first),
            stop=SimpleNamespace(remote=lambda: ray.log.append("stop")),
        )
        connection: Any = FakeConnection(ray.log, embedded=embedded)
        group: Any = "group"
        following = Following(RunFolder(tmp_path / "tiny"), connection, controller, group)
        stream = io.StringIO()
        error: RunError | None = None
        with Console(stream=stream) as console, interrupts() as received:
            received.listen(count=True)
            try:
                following.follow(console, received)
            except RunError as raised:
                error = raised
            finally:
                following.end()
        return ray.log, stream.getvalue(), error

    return run


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


CLEARED = [("killed", "controller"), ("killed", "tiny.engine"), ("removed", "group"), "closed"]


def test_to_the_end(follow) -> None:
    log, printed, error = follow([[Note("one")], [], [Note("two"), STOPPED]])
    assert (log, printed, error) == (CLEARED, "one\ntwo\n", None)


def test_an_embedded_ray_takes_everything_with_it(follow) -> None:
    log, _, _ = follow([[STOPPED]], embedded=True)
    assert log == ["closed"]


def test_one_ctrl_c_asks_the_run_to_stop(follow) -> None:
    log, printed, error = follow([ctrl_c, [], [STOPPED]])
    assert (log, error) == (["stop", *CLEARED], None)
    assert printed == ("stopping after this step and accepted requests; once more to end at once\n")


def test_a_second_one_does_not_wait(follow) -> None:
    log, _, error = follow([ctrl_c, ctrl_c, [STOPPED]])
    assert log == ["stop", *CLEARED]
    assert str(error) == "the run was ended without waiting; resume with --resume."


@pytest.mark.parametrize(
    ("reason", "sentence", "hint"),
    [
        ("a is 1; b is 2; do c.", "a is 1; b is 2", "do c"),
        ("ValueError: no hint", "ValueError: no hint", "see the log"),
    ],
)
def test_a_failed_run(follow, reason, sentence, hint) -> None:
    _, _, error = follow([[StateChange(RunState.FAILED, reason)]])
    assert (error.sentence, error.hint) == (sentence, hint)


def test_the_controller_dies(follow, tmp_path: Path) -> None:
    log, _, error = follow([ActorDiedError()])
    assert log == CLEARED
    assert str(error) == (
        "the controller of run tiny died; no checkpoint was committed; start the run again."
    )
    (tmp_path / "tiny" / "checkpoints" / "step-7").mkdir(parents=True)
    _, _, error = follow([ActorDiedError()])
    assert str(error) == (
        "the controller of run tiny died; the last committed checkpoint is "
        f"{tmp_path}/tiny/checkpoints/step-7; continue from it with --resume."
    )


def test_a_silent_controller_is_waited_for_while_the_head_answers(follow) -> None:
    silence: list[Any] = [GetTimeoutError(), ActorUnavailableError("away", None)] * 20
    log, _, error = follow([*silence, [STOPPED]])
    assert error is None
    assert log == ["slept"] * 20 + CLEARED


@pytest.mark.parametrize("embedded", [False, True])
def test_a_head_that_is_gone_is_given_up(follow, embedded) -> None:
    # The controller still answers: Ray would end this process after 60 s all the same.
    log, _, error = follow([[]] * 60, embedded=embedded, head=False)
    assert log == ["ray killed", "closed"]
    assert str(error) == (
        "the Ray head at 10.0.0.1:6379 is gone; no checkpoint was committed; start the run again."
    )


def test_before_there_is_a_run_a_signal_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
