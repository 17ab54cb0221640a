"""The life of a run: which states may follow which."""

from __future__ import annotations

import itertools

import pytest

from dualray.platform.states import RunState, check_transition

LIVES = [
    "starting training stopping stopped",
    "starting training switching serving stopping stopped",
    "starting switching serving switching training failed",
    "starting failed",
    "starting stopping failed",
]


@pytest.mark.parametrize("life", LIVES)
def test_a_run_may_live_so(life: str) -> None:
    for current, new in itertools.pairwise(life.split()):
        check_transition(RunState(current), RunState(new))


@pytest.mark.parametrize(
    ("current", "new"),
    [
        ("starting", "serving"),
        ("training", "serving"),
        ("training", "starting"),
        ("serving", "training"),
        ("stopping", "training"),
        ("stopped", "failed"),
        ("failed", "stopping"),
        ("training", "stopped"),
    ],
)
def test_a_run_may_not_live_so(current: str, new: str) -> None:
    with pytest.raises(ValueError, match=f"a run that is {current} cannot become {new}"):
        check_transition(RunState(current), RunState(new))


def test_only_ends_are_final() -> None:
    assert {state for state in RunState if state.is_final} == {RunState.STOPPED, RunState.FAILED}
