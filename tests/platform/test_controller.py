"""The controller with fake workers, without Ray: what is left of a run that does not go well."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from support.fake_run import FakeGang, FakeRay, controller_of, install, states_of
from support.runs import losses_of, make_corpus, metrics_of, state_of

from dualray.actors.gang import WorkerLostError
from dualray.checkpoint.store import find
from dualray.errors import ResourceError, RunError
from dualray.platform.controller import Controller
from dualray.platform.events import Event, StateChange
from dualray.platform.folder import RunFolder
from dualray.platform.states import RunState

LOST = WorkerLostError("worker 1 (process 7 on node) died during step", hint="see its log")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "bytes")


@pytest.fixture
def fakes(monkeypatch) -> tuple[FakeGang, FakeRay]:
    return install(monkeypatch)


@pytest.fixture
def gang(fakes) -> FakeGang:
    return fakes[0]


@pytest.fixture
def ray(fakes) -> FakeRay:
    return fakes[1]


@pytest.fixture
def control(tmp_path, monkeypatch, corpus, fakes):
    """control(serves, train={...}, **assignment) makes a controller of runs/tiny."""
    monkeypatch.chdir(tmp_path)

    def make(serves: bool = False, train: dict | None = None, **assignment) -> Controller:
        return controller_of(corpus, train or {}, {"after_training": serves}, **assignment)

    return make


def reason_of(controller: Controller) -> str:
    last = controller.poll(0, 0.0)[-1]
    assert isinstance(last, StateChange)
    assert last.state is RunState.FAILED
    return last.reason


def raising(error: Exception, *, at: int = 0) -> Callable[..., None]:
    def act(step: int = 0, *_: Any) -> None:
        if step >= at:
            raise error

    return act


def test_a_whole_life(control, gang, ray) -> None:
    controller = control(train={"eval_every": 2, "checkpoint_every": 3})
    controller.run()
    folder = RunFolder.named("tiny")
    assert states_of(controller.poll(0, 0.0)) == ["training", "stopping", "stopped"]
    assert losses_of(folder.path) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert gang.calls == [
        *("step", "step", "evaluate", "step", "write_checkpoint", "step", "evaluate"),
        *("write_checkpoint", "stop"),
    ]
    assert ray.removed == ["group"]
    state = state_of(folder.path)
    assert (state["state"], state["auth_token"]) == ("stopped", None)
    assert controller.status()["step"] == 4
    assert "auth_token" not in controller.status()


def test_stopped_while_starting_it_can_be_started_again(control) -> None:
    controller = control(serves=True)
    controller.stop()
    controller.run()
    assert states_of(controller.poll(0, 0.0)) == ["stopping", "stopped"]
    folder = RunFolder.named("tiny")
    assert not folder.metrics.exists()
    folder.refuse_if_used()


def test_stopped_in_a_step_it_commits_that_step(control, gang) -> None:
    controller = control(serves=True)
    gang.before["step"] = lambda step, _: controller.stop() if step == 1 else None
    controller.run()
    assert states_of(controller.poll(0, 0.0)) == ["training", "stopping", "stopped"]
    folder = RunFolder.named("tiny").path
    assert list(losses_of(folder)) == [1, 2]
    assert find(folder).path == folder / "checkpoints" / "step-2"


def test_a_worker_lost_before_the_first_checkpoint(control, gang, ray) -> None:
    controller = control()
    gang.before["step"] = raising(LOST, at=2)
    controller.run()
    assert reason_of(controller) == (
        "worker 1 (process 7 on node) died during step; no checkpoint was committed, start the run "
        "again."
    )
    assert gang.calls[-1] == "stop"
    assert ray.removed == ["group"]
    assert state_of(RunFolder.named("tiny").path)["state"] == "failed"


def test_a_worker_lost_after_a_checkpoint(control, gang) -> None:
    controller = control(train={"checkpoint_every": 1})
    gang.before["step"] = raising(LOST, at=2)
    controller.run()
    step_2 = RunFolder.named("tiny").checkpoints / "step-2"
    assert reason_of(controller) == (
        f"worker 1 (process 7 on node) died during step; the last committed checkpoint is {step_2},"
        " continue from it with --resume."
    )


def test_a_worker_lost_after_resuming_names_what_was_resumed(control, gang) -> None:
    control(train={"checkpoint_every": 2}).run()
    step_2 = RunFolder.named("tiny").checkpoints / "step-2"
    controller = control(resumes=True, restore_from=step_2, first_step=2)
    gang.before["step"] = raising(LOST)
    controller.run()
    assert f"the last committed checkpoint is {step_2}," in reason_of(controller)
    # What came after the checkpoint is forgotten, as its steps will be done again.
    assert list(losses_of(RunFolder.named("tiny").path)) == [1, 2]


def test_a_worker_lost_while_serving_ends_the_run(control, gang, ray) -> None:
    controller = control(serves=True)
    looks = iter([None, None, LOST])

    def look() -> None:
        if (error := next(looks)) is not None:
            raise error

    gang.before["info"] = look
    controller.run()
    states = ["training", "switching", "serving", "failed"]
    assert states_of(controller.poll(0, 0.0)) == states
    step_4 = RunFolder.named("tiny").checkpoints / "step-4"
    assert f"the last committed checkpoint is {step_4}," in reason_of(controller)
    assert ray.killed == 1
    [switch] = [r for r in metrics_of(RunFolder.named("tiny").path) if r.get("event") == "switch"]
    assert switch["workers_before"] == switch["workers_after"] == [6, 7]
    assert controller.status()["target"] is None


def test_a_taken_port_is_found_before_training(control, gang, ray) -> None:
    ray.refused = RayTaskError(
        "start", "a remote traceback", ResourceError("serve.port is 5", hint="choose another")
    ).as_instanceof_cause()
    controller = control(serves=True)
    controller.run()
    assert reason_of(controller) == "serve.port is 5; choose another."
    assert gang.calls == ["stop"]
    folder = RunFolder.named("tiny")
    assert not folder.metrics.exists()
    assert not folder.checkpoints.exists()
    folder.refuse_if_used()


def test_a_bug_of_ours_leaves_its_traceback(control, gang) -> None:
    controller = control()
    gang.before["step"] = raising(ValueError("first line\nsecond line"))
    controller.run()
    file = RunFolder.named("tiny").path / "error.txt"
    assert reason_of(controller) == f"ValueError: first line; {file} has the traceback."
    assert "in act" in file.read_text()


def test_a_bug_in_a_worker_leaves_its_traceback(control, gang) -> None:
    controller = control()
    error = RunError("worker 0 failed in step with KeyError: 0", hint="this is a bug")
    error.__cause__ = RayTaskError("step", "a remote traceback", KeyError(0))
    gang.before["step"] = raising(error)
    controller.run()
    file = RunFolder.named("tiny").path / "error.txt"
    assert reason_of(controller) == (
        f"worker 0 failed in step with KeyError: 0; this is a bug, and {file} has the traceback."
    )
    assert "a remote traceback" in file.read_text()


def test_clients_wait_for_events_and_remember_where_they_are(control) -> None:
    controller = control()
    threading.Thread(target=controller.run).start()
    seen: list[Event] = []
    while not (states_of(seen) and states_of(seen)[-1].is_final):
        new = controller.poll(len(seen), 30.0)
        assert new, "no event within 30 s"
        seen += new
    assert seen == controller.poll(0, 0.0)
