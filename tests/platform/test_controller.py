"""The controller with fake workers, without Ray: what is left of a run that does not go well."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from support.runs import losses_of, make_corpus, metrics_of, state_of, write_run_file

from dualray.actors.cluster import Connection
from dualray.actors.gang import WorkerLostError
from dualray.actors.grpc_security import OwnAccess
from dualray.actors.stage_worker import WorkerInfo
from dualray.checkpoint.store import find
from dualray.checkpoint.writer import Piece, write_rank
from dualray.errors import ResourceError, RunError
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.nodes import NodeMap
from dualray.parallel.state_place import StateBytes
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.platform import controller as module
from dualray.platform import life, serving
from dualray.platform.assignment import Assignment
from dualray.platform.controller import Controller
from dualray.platform.events import Event, StateChange
from dualray.platform.folder import RunFolder
from dualray.platform.run_file import load_run_file
from dualray.platform.states import RunState

LOST = WorkerLostError("worker 1 (process 7 on node) died during step", hint="see its log")
CONNECTION = Connection(address="127.0.0.1:1", embedded=False, auth_token="secret")


class FakeGang:
    """Two workers whose losses are the step's number. `before[method](*args)` runs first."""

    def __init__(self) -> None:
        self.infos = [
            WorkerInfo(rank=rank, pid=6 + rank, node="node", memory_bytes=1e9, has_device=False)
            for rank in range(2)
        ]
        self.workers = [None, None]
        self.before: dict[str, Callable[..., None]] = {}
        self.calls: list[str] = []

    def create(self, *args: Any) -> FakeGang:
        return self

    def start(self, nodes: NodeMap | None) -> None:
        assert nodes is None

    def dead_ranks(self) -> list[int]:
        self.call("info")
        return []

    def without(self, ranks: Any) -> FakeGang:
        assert not ranks
        return self

    def call(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        self.before.get(method, lambda *_: None)(*args)
        answers: dict[str, Callable[[], list[Any]]] = {
            "step": lambda: [result(args[0] + 1)] * 2,
            "evaluate": lambda: [HeldOut(loss_sum=10.0, targets=5)] * 2,
            "write_checkpoint": lambda: [
                write_rank(Path(args[0]), 0, [Piece.whole("model.norm.weight", torch.ones(3))])
            ],
            "digest": lambda: [10, 2**128 + 6],
            "put_state_away": lambda: [StateBytes(kept=9), StateBytes(kept=8)],
            "cache_bytes": lambda: [5, 4],
        }
        return answers.get(method, lambda: [None, None])()

    def pids(self) -> list[int]:
        return [info.pid for info in self.infos]

    def stop(self) -> None:
        self.calls.append("stop")


def result(step: int) -> StepResult:
    return StepResult(
        loss=float(step), mtp_loss=[], balance_loss=0.0, grad_norm=1.0, lr=0.1, bubble=0.0,
        exposed_communication=0.0, step_time_s=0.1, loads={}, max_vio={},
        work=ExpertWork(slot_rows={}, seconds={}), cross_node_bytes=0, spans=[],
    )  # fmt: skip


class FakeRay:
    """`ray.get` of what an actor's method returned."""

    def __init__(self) -> None:
        self.refused: Exception | None = None
        self.util = SimpleNamespace(remove_placement_group=lambda group: self.removed.append(group))
        self.removed: list[Any] = []
        self.killed = 0
        self.drained: list[str] = []

    def drain(self, then: str, within_s: float) -> int:
        self.drained.append(then)
        return 0

    def remote(self, actor: type) -> Any:
        def start() -> str:
            if self.refused is not None:
                raise self.refused
            return "127.0.0.1:5"

        methods = {"start": start, "serve": lambda *_: None, "stop": lambda: None}
        methods |= {"migrations": lambda: [], "placement": lambda: None}
        methods |= {"drain": self.drain}
        methods |= {"own_access": lambda: OwnAccess(target="127.0.0.1:5", token=None)}
        handle = SimpleNamespace(
            **{name: SimpleNamespace(remote=method) for name, method in methods.items()}
        )
        return SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda **_: handle),
        )

    def get(self, value: Any, timeout: float | None = None) -> Any:
        return value

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "bytes")


@pytest.fixture
def gang(monkeypatch) -> FakeGang:
    gang = FakeGang()
    monkeypatch.setattr(module, "Gang", gang)
    return gang


@pytest.fixture
def ray(monkeypatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(serving, "ray", fake)
    monkeypatch.setattr(serving, "first_token_at", lambda target, run_name, token: 1e12)
    monkeypatch.setattr(life, "LOOK_AFTER_WORKERS_S", 0.0)
    return fake


@pytest.fixture
def control(tmp_path, monkeypatch, corpus, gang, ray):
    """control(serves, train={...}, **assignment) makes a controller of runs/tiny."""
    monkeypatch.chdir(tmp_path)

    def make(serves: bool = False, train: dict | None = None, **assignment) -> Controller:
        path = write_run_file(
            tmp_path / "tiny.yaml", corpus, serve={"after_training": serves}, train=train or {}
        )
        values = {"run": load_run_file(path), "folder": RunFolder.named("tiny"), "trains": True}
        return Controller(Assignment(**(values | assignment)), "group", CONNECTION)

    return make


def states_of(events: list[Event]) -> list[RunState]:
    return [event.state for event in events if isinstance(event, StateChange)]


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
