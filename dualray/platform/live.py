"""Reaching the controller of a run that another process started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from dualray.actors.cluster import NAMESPACE, answers, attach
from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.errors import RunError
from dualray.platform.folder import RunFolder
from dualray.platform.modes import Mode
from dualray.platform.states import RunState

LOST = "lost"
"""Shown for a run whose last word was not its end and that nobody answers for."""

_POLL_S = 0.2
_ANSWER_WITHIN_S = 30.0
_LOOK_EVERY_S = 2.0


def look(folder: RunFolder) -> dict[str, Any]:
    """The run's present state, `LOST` if its controller is gone without a word."""
    state = _public(folder.read_state())
    if RunState(state["state"]).is_final:
        return state
    try:
        with _controller(folder) as controller:
            return ray.get(controller.status.remote(), timeout=_ANSWER_WITHIN_S)
    except RunError:
        return state | {"state": LOST, "target": None}


def end(folder: RunFolder, timeout_s: float) -> str:
    """Stop the run and wait until it has ended; says how."""
    state = folder.read_state()
    name = state["name"]
    if RunState(state["state"]).is_final:
        return f"run {name} has ended already ({state['state']})"
    with _controller(folder) as controller:
        ray.get(controller.stop.remote(), timeout=_ANSWER_WITHIN_S)
    # Not connected any more: an embedded Ray ends with its run, and would take us along.
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = folder.read_state()
        if RunState(state["state"]).is_final:
            return f"run {name} is {state['state']}"
        time.sleep(_POLL_S)
    raise RunError(
        f"run {name} is still {state['state']} after {timeout_s:g} s", hint="wait and look again"
    )


def switch(folder: RunFolder, mode: Mode, timeout_s: float) -> ModeAnswer:
    """Let the run train, serve or pause, and wait until it does.

    Raises RunError with the run's own reason if it does not, or if nobody answers.
    """
    state = folder.read_state()
    name = state["name"]
    if RunState(state["state"]).is_final:
        raise RunError(
            f"run {name} has ended ({state['state']}) and cannot be switched",
            hint=f"start it again, or serve it with dualray serve {folder.path}",
        )
    with _controller(folder) as controller:
        asked, deadline = controller.switch.remote(str(mode)), time.monotonic() + timeout_s
        while not ray.wait([asked], timeout=_LOOK_EVERY_S)[0]:
            if time.monotonic() > deadline:
                raise RunError(
                    f"run {name} has not switched to {mode} within {timeout_s:g} s, but will do so",
                    hint="look with dualray status, or wait longer with --timeout",
                )
            if not answers(state["address"]):
                break  # before Ray ends this process for it
        try:
            answer = ray.get(asked, timeout=_LOOK_EVERY_S)
        except (RayActorError, GetTimeoutError):
            raise RunError(
                f"run {name} has ended meanwhile, or its Ray has",
                hint="see what its command says and continue it with dualray train --resume",
            ) from None
    if isinstance(answer, Refusal):
        raise RunError(answer.sentence, hint=answer.hint)
    return answer


@contextmanager
def _controller(folder: RunFolder) -> Iterator[Any]:
    state = folder.read_state()
    try:
        connection = attach(state["address"], state.get("auth_token"))
    except RunError as error:
        raise RunError(
            f"run {state['name']} is lost ({error.sentence})",
            hint="continue it with dualray train --resume",
        ) from None
    try:
        yield ray.get_actor(f"{state['name']}.controller", namespace=NAMESPACE)
    except (ValueError, RayActorError):
        raise RunError(
            f"run {state['name']} has no controller at {state['address']}",
            hint="it has ended; continue it with dualray train --resume",
        ) from None
    except GetTimeoutError:
        raise RunError(
            f"run {state['name']} does not answer at {state['address']}", hint="try again"
        ) from None
    finally:
        connection.close()


def _public(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "auth_token"}
